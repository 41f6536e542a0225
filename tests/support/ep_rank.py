"""One of several processes that exchange rows: the child of tests/unit/replay/ep/test_exchange.py.

    python -m support.ep_rank STORE RANK SIZE

It goes through every case in groups of 1, 2 and 4 ranks: what a rank gets for its tokens must be
what one layer with all experts makes of them. It ends with an error if that is not so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from moe_lens.replay.ep.exchange import combine, dispatch, route
from moe_lens.replay.ep.workload import workload
from moe_lens.replay.placement.methods import METHODS, place
from moe_lens.replay.placement.plan import Placement, slots_of
from moe_lens.replay.placement.traffic import sources
from moe_lens.replay.policies import POLICIES, Policy, apply
from moe_lens.replay.routing import Routed
from moe_lens.runtime.layer import MoELayer
from moe_lens.runtime.weights import random_weights
from moe_lens.trace.meta import LayerInfo

E, K, D, F = 8, 3, 12, 10
INFO = LayerInfo(0, "0", E, K, normalised=True)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    name: str
    ids_TK: np.ndarray
    weights_TK: np.ndarray


def cases() -> Iterator[Case]:
    """Every policy on a skewed batch, and batches that leave ranks with nothing to do."""
    g = np.random.default_rng(3)
    skewed = routed(g, 37)
    for name in POLICIES:
        policy = Policy(name, 1.0 if name in ("drop", "reroute") else None)
        work = apply(policy, skewed, INFO)
        yield Case(name, work.expert_ids_TK, work.weights_TK)
    few = np.tile(np.array([[5, 4, -1]], np.int32), (9, 1))
    yield Case("two experts, of all ranks one or two", few, np.full((9, K), 0.5, np.float32))
    yield Case("one token", few[:1], np.full((1, K), 0.25, np.float32))
    yield Case("no row", np.full((6, K), -1, np.int32), np.zeros((6, K), np.float32))
    yield Case("no token", np.zeros((0, K), np.int32), np.zeros((0, K), np.float32))


def routed(g: np.random.Generator, tokens: int) -> Routed:
    popular_E = 1 / np.arange(1, E + 1)
    order = np.stack(
        [g.choice(E, E, replace=False, p=popular_E / popular_E.sum()) for _ in range(tokens)]
    ).astype(np.int32)
    weights = g.random((tokens, E), dtype=np.float32)
    dropped = g.random((tokens, K)) < 0.1
    return Routed(
        0, 0, 0, 0, "eval", order[:, :K], weights[:, :K], 0, dropped, order[:, K:], weights[:, K:]
    )


def plans(ranks: int, ids_TK: np.ndarray) -> Iterator[Placement]:
    """Every way to place, fitted to the batch; replicas fill the ranks up once more."""
    rows_E = np.bincount(ids_TK[ids_TK >= 0], minlength=E)[None]
    chose_TE = np.zeros((len(ids_TK), E + 1))
    np.put_along_axis(chose_TE, ids_TK.astype(np.int64), 1, axis=1)
    together_LEE = (chose_TE[:, :E].T @ chose_TE[:, :E])[None]
    for method in METHODS:
        for replicas in (0, 4):
            yield place(
                method, rows_E, (0,), ranks=ranks, replicas=replicas, together_LEE=together_LEE
            )


def check(case: Case, plan: Placement, rank: int, group: dist.ProcessGroup, *, dedup: bool) -> None:
    gate_up, down = random_weights(E, D, F, dtype=torch.float32, device=CPU, seed=0)
    tokens = len(case.ids_TK)
    x_TD = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))
    whole = MoELayer(gate_up, down)
    ids_TK, gates_TK = torch.from_numpy(case.ids_TK), torch.from_numpy(case.weights_TK)
    want_TD = whole(x_TD, ids_TK, gates_TK)

    slots_P = plan.slots_LP[0]
    slot_TK = slots_of(case.ids_TK, slots_P, E)
    mine = np.flatnonzero(sources(tokens, plan.ranks) == rank)
    held = torch.from_numpy(slots_P.reshape(plan.ranks, -1)[rank].astype(np.int64))
    own = MoELayer(gate_up[held], down[held])
    to = route(
        slot_TK[mine], case.weights_TK[mine], plan.ranks, plan.slots_per_rank,
        dedup=dedup, device=CPU,
    )  # fmt: skip
    arrived = dispatch(x_TD[mine], to, group)
    # What arrives is what a simulation says: the same rows in the same order.
    said = workload(slot_TK, case.weights_TK, rank, plan.slots_per_rank, dedup=dedup)
    assert torch.equal(arrived.x_ND, x_TD[said.token_N])
    assert torch.equal(arrived.slots_NJ, torch.from_numpy(said.slots_NJ))
    assert torch.equal(arrived.weights_NJ, torch.from_numpy(said.weights_NJ))
    y_ND = own(arrived.x_ND, arrived.slots_NJ, arrived.weights_NJ)
    got_TD = combine(y_ND, arrived, to, group)
    torch.testing.assert_close(got_TD, want_TD[mine], rtol=1e-5, atol=1e-5)


def main(store: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    checked = 0
    for ranks in (1, 2, 4):
        group = dist.new_group(list(range(ranks)), timeout=timedelta(seconds=60))
        if rank >= ranks:
            continue
        for case in cases():
            for plan in plans(ranks, case.ids_TK):
                for dedup in (True, False):
                    check(case, plan, rank, group, dedup=dedup)
                    checked += 1
    print(checked)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

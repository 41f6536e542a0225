"""Is the answer right? Asked before anything is timed; who fails is not timed.

Integers are compared with the plain torch of `moe_lens.runtime.reference` on the CPU, outputs with
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from candidates import CLOSE, Candidate, Weights, reason
from shapes import DTYPE, Case
from torch import Tensor

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime import ops, reference
from moe_lens.runtime.backend import NAMES
from moe_lens.runtime.checks import check_ids
from moe_lens.runtime.layer import MoELayer

SAMPLED = 32
"""Tokens of a batch that are computed in float64."""

E, D, F, K = 16, 256, 192, 4


@dataclass
class Checked:
    """What a check found.

    Attributes:
        first_s: Seconds of the first call, compiling included.
    """

    ok: bool
    said: str
    error: float | None = None
    same_twice: bool | None = None
    first_s: float | None = None


def exact(case: Case, weights: Weights, ids_TK: Tensor, token_N: Tensor) -> Tensor:
    """The layer's output for some tokens, in float64: [N, D]."""
    gate_up, down = weights
    y_ND = torch.zeros(len(token_N), down.shape[1], dtype=torch.float64, device=down.device)
    x_ND, ids_NK = case.x_TD[token_N].double(), ids_TK[token_N]
    weights_NK = case.weights_TK[token_N].double()
    for expert in ids_NK[ids_NK >= 0].unique().tolist():
        n, k = (ids_NK == expert).nonzero(as_tuple=True)
        gate, up = (x_ND[n] @ gate_up[expert].double().T).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        y_ND.index_add_(0, n, (h @ down[expert].double().T) * weights_NK[n, k, None])
    return y_ND


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance; 1e9 where anything is not a number."""
    distance = float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return distance if distance < 1e9 else 1e9  # JSON has neither NaN nor infinity


def poison(like: Tensor, sizes: list[int]) -> None:
    """Leave NaN in the memory that the next tensors of these sizes are likely to be given."""
    held = [torch.full((n,), torch.nan, dtype=like.dtype, device=like.device) for n in sizes]
    del held


def candidate(who: Candidate, case: Case, weights: Weights) -> Checked:
    """One candidate on one case: close to float64, the same twice, and no NaN gets out."""
    if who.work is None:
        return Checked(False, who.why)
    try:
        begun = perf_counter()
        found = who.work()
        _wait(case.x_TD)
        first_s = perf_counter() - begun
        if not who.whole:
            return Checked(True, "not a whole layer: not compared", first_s=first_s)
        result = _compared(who, case, weights, found)
        result.first_s = first_s
        return result
    except Exception as e:  # whatever it is, the others race on
        return Checked(False, reason(e))


def _compared(who: Candidate, case: Case, weights: Weights, found: Tensor) -> Checked:
    tokens = len(case.ids_TK)
    token_N = torch.linspace(0, tokens - 1, min(SAMPLED, tokens)).long().to(case.x_TD.device)
    token_N = token_N.unique()
    distance = error(found[token_N], exact(case, weights, case.ids_TK, token_N))
    slots, shape = case.ids_TK.numel(), case.shape
    poison(case.x_TD, [slots * w for w in (shape.hidden, 2 * shape.intermediate)])
    assert who.work is not None
    again = who.work()
    same = bool(torch.equal(found, again))
    if distance > who.limit:
        return Checked(False, f"{distance:.2e} from float64 > {who.limit}", distance, same)
    if not bool(torch.isfinite(again).all()):
        return Checked(False, "not finite", distance, same)
    if who.dropped is None:
        return Checked(True, "", distance, same)
    if not same:
        return Checked(False, "another result the second time", distance, same)
    return _without_some(who.dropped, case, weights, token_N, distance)


def _without_some(
    run: Callable[[Tensor], Tensor],
    case: Case,
    weights: Weights,
    token_N: Tensor,
    distance: float,
) -> Checked:
    """Rows that no slot owns, in memory that is full of NaN."""
    ids_TK = case.ids_TK.clone()
    ids_TK[:, 0] = -1
    ids_TK[0] = -1
    slots, shape = ids_TK.numel(), case.shape
    widths = (shape.hidden, shape.hidden, 2 * shape.intermediate, shape.intermediate)
    poison(case.x_TD, [slots * w for w in widths])
    found = run(ids_TK)
    partly = error(found[token_N], exact(case, weights, ids_TK, token_N))
    if not bool(torch.isfinite(found).all()):
        return Checked(False, "NaN leaks from rows of no slot", partly, True)
    if float(found[0].abs().max()) != 0:
        return Checked(False, "a token without experts is not zero", partly, True)
    ok = partly <= CLOSE
    said = "" if ok else f"{partly:.2e} from float64 where slots do not run"
    return Checked(ok, said, max(distance, partly), True)


def small(device: str, without: set[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Checks on small layers: (name, check), which returns what is wrong, or nothing."""
    for tokens in (0, 1, 7, 700, 5000):
        for kind in ("even", "skewed", "dropped", "one expert", "none"):
            yield (
                f"plan, {tokens} tokens, {kind}",
                lambda t=tokens, k=kind: _plan(device, t, k),
            )
    for by in ("position", "prob"):
        for tokens in (1, 700):
            yield (
                f"capacity, reroute, {tokens} tokens, by {by}",
                lambda t=tokens, b=by: _capacity(device, t, b),
            )
    yield "a duplicate id is refused", lambda: _duplicate(device)
    kinds = ("cpu", "reference") if device == "cpu" else tuple(n for n in NAMES if n != "cpu")
    for backend in kinds:
        if backend not in without:
            yield f"layer, {backend}", lambda b=backend: _layer(device, b)
            if device != "cpu" and backend in ("cuda+grouped_mm", "cuda+triton"):
                yield f"graph for another routing, {backend}", lambda b=backend: _graph(device, b)


def _ids(tokens: int, kind: str, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    exponent = 1.5 if kind == "skewed" else 0.0
    share_E = torch.arange(1.0, E + 1) ** -exponent
    ids_TK = torch.empty(0, K).int()
    if tokens:
        ids_TK = torch.multinomial(share_E.expand(tokens, E), K).int()
    if kind == "dropped":
        ids_TK[torch.rand(tokens, K) < 0.5] = -1
    if kind in ("one expert", "none"):
        ids_TK[:] = -1
    if kind == "one expert":
        ids_TK[:, 1] = 3
    return ids_TK


def _plan(device: str, tokens: int, kind: str) -> str:
    ids_TK = _ids(tokens, kind)
    wanted = reference.plan(ids_TK, E)
    found = ops.plan(ids_TK.to(device), E)
    again = ops.plan(ids_TK.to(device), E)
    for name in ("row_TK", "slot_S", "ends_E"):
        if not torch.equal(getattr(found, name).cpu(), getattr(wanted, name)):
            return f"{name} differs from the reference"
        if not torch.equal(getattr(found, name), getattr(again, name)):
            return f"{name} differs the second time"
    return ""


def _capacity(device: str, tokens: int, by: str) -> str:
    torch.manual_seed(1)
    order_TE = torch.rand(tokens, E).argsort(1).int()
    ids_TK, next_ids_TM = order_TE[:, :K].contiguous(), order_TE[:, K : K + 3].contiguous()
    more = {
        "priority_TK": (torch.rand(tokens, K) * 8).round() / 8,  # has ties
        "next_ids_TM": next_ids_TM,
        "next_priority_TM": torch.rand(tokens, 3),
    }
    room = -(-9 * tokens * K // (10 * E))
    wanted = reference.capacity(ids_TK, E, room, by=by, **more)
    there = {name: value.to(device) for name, value in more.items()}
    found = ops.capacity(ids_TK.to(device), E, room, by=by, **there)
    for name in ("expert_ids_TK", "runner_up_TK"):
        if not torch.equal(getattr(found, name).cpu(), getattr(wanted, name)):
            return f"{name} differs from the reference"
    placed_TK = found.expert_ids_TK.cpu()
    load_E = torch.bincount(placed_TK[placed_TK >= 0].long(), minlength=E)
    return "" if int(load_E.max()) <= room else "an expert has more than it has room for"


def _duplicate(device: str) -> str:
    try:
        check_ids(torch.tensor([[0, 1, 2, 1]], dtype=torch.int32, device=device), E)
    except RuntimeInputError:
        return ""
    return "it was taken"


def _batch(device: str, tokens: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    ids_TK = _ids(tokens, kind, seed).to(device)
    x_TD = torch.randn(tokens, D).to(device, DTYPE)
    return x_TD, ids_TK, torch.rand(tokens, K).to(device, DTYPE)


def _wanted(layer: Weights, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, ids, weights = given
    return reference.moe(x.double(), ids, weights.double(), layer[0].double(), layer[1].double())


def _layer_of(device: str, backend: str) -> tuple[MoELayer, Weights]:
    torch.manual_seed(2)
    weights = (
        (torch.randn(E, 2 * F, D) * D**-0.5).to(device, DTYPE),
        (torch.randn(E, D, F) * F**-0.5).to(device, DTYPE),
    )
    return MoELayer(*weights, backend=backend), weights


def _layer(device: str, backend: str) -> str:
    layer, weights = _layer_of(device, backend)
    for tokens in (0, 1, 33, 700):
        for kind in ("even", "skewed", "dropped", "one expert", "none"):
            given = _batch(device, tokens, kind)
            slots = tokens * K
            poison(given[0], [slots * D, slots * 2 * F, slots * F, slots * D])
            found = layer(*given)
            where = f"{tokens} tokens, {kind}"
            if (distance := error(found, _wanted(weights, given))) > CLOSE:
                return f"{where}: {distance:.2e} from float64"
            if not torch.equal(found, layer(*given)):
                return f"{where}: another result the second time"
    x_TD, ids_TK, gates_TK = _batch(device, 90, "dropped")
    clean = layer(x_TD, ids_TK, gates_TK)
    x_TD[40] = torch.nan
    others = torch.arange(90, device=device) != 40
    if not torch.equal(layer(x_TD, ids_TK, gates_TK)[others], clean[others]):
        return "a token of NaN changes other tokens"
    return ""


def _graph(device: str, backend: str) -> str:
    """A graph that was captured for one routing, replayed for others."""
    layer, _ = _layer_of(device, backend)
    static = _batch(device, 300, "even")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(*static)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # asked before a capture fails
    try:
        layer(*static)
    except RuntimeError as e:
        return f"waits for the device: {str(e).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = layer(*static)
    for seed, kind in enumerate(("skewed", "dropped", "one expert", "none")):
        given = _batch(device, 300, kind, seed + 1)
        for old, new in zip(static, given, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(y_TD, layer(*given)):
            return f"{kind}: the graph gives another result than the call"
    return ""


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()

"""An expert-parallel block is recorded while a clock of our own stands around its all-to-alls."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe_lens

STEPS = ("plain", "checkpointed", "plain", "rank 0 is late")
NAP_S = 1.0


def record(
    block: nn.Module,
    router: nn.Module,
    counted: Callable[[Any], Tensor],
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    dispatches: int,
    folder: Path,
    rank: int,
    **how: Any,
) -> None:
    """Record STEPS into FOLDER/run; FOLDER/RANK.json has `clock`, ns of (dispatch, combine) by
    step, and `choices_E`, those of all steps, as the router's own output tells them.

    Args:
        block: Recorded.
        router: Of it.
        counted: The router's output to choices `[E]`.
        run: Calls it and returns its output.
        x: What it is given, requiring a gradient.
        dispatches: Its all-to-alls before the experts run, as its source says; combine is one.
    """
    want = run(x).detach()
    before = dist.all_to_all_single
    told = []
    calls: list[int] = []
    late = False
    choices: list[Tensor] = []
    hook = router.register_forward_hook(lambda m, args, out: choices.append(counted(out).detach()))
    with moe_lens.record(block, folder / "run", tokens=1.0, coordinates={"ep": rank}, **how) as rec:
        inner = dist.all_to_all_single
        assert inner is not before

        def outer(*args: Any, **kwargs: Any) -> Any:
            if late and not calls:
                time.sleep(NAP_S)
            start = time.perf_counter_ns()
            out = inner(*args, **kwargs)
            calls.append(time.perf_counter_ns() - start)
            return out

        dist.all_to_all_single = outer
        for step in STEPS:
            late = step == "rank 0 is late" and rank == 0
            dist.barrier()
            calls.clear()
            before_step = len(choices)
            with rec.step("all"):
                out = checkpoint(run, x, use_reentrant=False) if step == "checkpointed" else run(x)
                seen = list(calls)
                assert len(choices) == before_step + 1
                out.square().sum().backward()
            del choices[before_step + 1 :]  # the recomputation decides nothing
            assert torch.equal(out, want)
            assert len(seen) == dispatches + 1
            assert len(calls) > len(seen)  # the backward pass and the recomputation exchange too
            told.append([sum(seen[:dispatches]), sum(seen[dispatches:])])
        dist.all_to_all_single = inner
    assert dist.all_to_all_single is before
    hook.remove()
    choices_E = torch.stack(choices).sum(0).tolist()
    (folder / f"{rank}.json").write_text(json.dumps({"clock": told, "choices_E": choices_E}))

"""What recording costs a model: CPU in hooks and writer over the model's own.

transformers' Qwen3-MoE, random weights: 8 layers, 64 experts, top-8, hidden 512, expert size 256, a
batch of 4 x 256 tokens, eval mode, no gradients, one thread. Gates: at most 1 % with counts alone
(`tokens=0`), at most 4 % with every token's row (`tokens=1.0`).

The gates are on what is measured directly. Hooks: CPU time of the model's thread inside every hook,
and inside what `rec.step` does before and after its body. Writer: CPU time of the process that the
model's thread did not spend, from the first step until the trace is sealed and closed; the same
figure of a model that is not recorded is printed beside it. Both are over the CPU time of the same
forwards less the hooks.

Beside it stands the ratio of whole processes: CPU of a recorded forward over that of a bare one, in
turns, with an A/A pair. It includes what hooks do to caches, and all the noise of the machine.

Closing seals six small files, which takes some 40 ms whatever the length of the run; it is counted,
over 64 forwards. (`--quick` runs 4, and so charges each with a sixteenfold share of it.)

    python benchmarks/hook_overhead.py [--quick]
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from _common import Pairs, Report, interleaved, is_quick, progress, scratch, table
from torch import Tensor, nn

import moe_lens_hooks.attach
from moe_lens_hooks.recorder import Recorder

SEED = 2026
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    # A small vocabulary: a large one would make the model dearer, and the hooks look cheaper.
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
BATCH, POSITIONS = 4, 256


class HookTime:
    """CPU seconds of the calling thread inside hooks (they do not nest)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.hook = moe_lens_hooks.attach._hook

    def wrap(self, of: nn.Module | None, *forms: Callable[..., None]) -> Callable[..., None]:
        """In the place of `attach._hook`, which makes every hook."""
        hook = self.hook(of, *forms)

        def timed(*args: Any, **kwargs: Any) -> None:
            before = time.thread_time()
            hook(*args, **kwargs)
            self.seconds += time.thread_time() - before

        return timed

    def time(self, work: Callable[[], Any]) -> None:
        before = time.thread_time()
        work()
        self.seconds += time.thread_time() - before


def cpu_now() -> tuple[float, float]:
    """CPU seconds so far of this thread, and of all the others."""
    own = time.thread_time()
    return own, time.process_time() - own


def direct(
    model: nn.Module, batches: list[Tensor], run: Path, tokens: float | None
) -> dict[str, float]:
    """CPU of hooks and of other threads over the model's own; `tokens=None`: not recorded."""
    hooks = HookTime()
    forwards = len(batches)
    model(batches[0])
    if tokens is None:
        own, others = cpu_now()
        for ids in batches:
            model(ids)
        own, others = (b - a for a, b in zip((own, others), cpu_now(), strict=True))
    else:
        moe_lens_hooks.attach._hook = hooks.wrap
        try:
            recorder = Recorder(model, run, tokens=tokens)
        finally:
            moe_lens_hooks.attach._hook = hooks.hook
        model(batches[0])  # the first forward learns what the routers do
        recorder.flush()
        hooks.seconds = 0.0
        own, others = cpu_now()
        for ids in batches:
            step = recorder.step()
            hooks.time(step.__enter__)
            model(ids)
            hooks.time(partial(step.__exit__, None, None, None))
        own = time.thread_time() - own - hooks.seconds
        recorder.close()  # the writer seals; this thread waits
        others = cpu_now()[1] - others
        if recorder._writer.lost_rows:
            raise SystemExit(f"{recorder._writer.lost_rows} rows were lost")
    return {
        "hooks": hooks.seconds / own,
        "writer": others / own,
        "both": (hooks.seconds + others) / own,
        "model_ms_per_forward": 1e3 * own / forwards,
        "hooks_ms_per_forward": 1e3 * hooks.seconds / forwards,
        "writer_ms_per_forward": 1e3 * others / forwards,
    }


def whole(model: nn.Module, ids: Tensor, run: Path, tokens: float | None, rounds: int) -> Pairs:
    """A bare forward, then one of a recorded twin; `tokens=None`: of a bare twin (A/A)."""
    twin = copy.deepcopy(model)
    if tokens is None:
        return interleaved(lambda: model(ids), lambda: twin(ids), rounds)
    with Recorder(twin, run, tokens=tokens) as recorder:

        def recorded() -> None:
            with recorder.step():
                twin(ids)
            recorder.flush()  # the writer's work on this forward belongs to this forward

        return interleaved(lambda: model(ids), recorded, rounds)


def main() -> int:
    quick = is_quick(__doc__)
    forwards, repeats, rounds = (4, 1, 4) if quick else (64, 2, 16)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(SEED)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**CONFIG)).eval()
    batches = list(torch.randint(CONFIG["vocab_size"], (forwards, BATCH, POSITIONS)))
    setup = {
        "model": "transformers.Qwen3MoeForCausalLM, random weights",
        "config": CONFIG,
        "batch": [BATCH, POSITIONS],
        "seed": SEED,
        "torch_threads": 1,
        "forwards": forwards,
        "repeats": repeats,
    }
    report = Report("hook_overhead", setup, ("torch", "transformers"))
    modes = {"not recorded": None, "counts (tokens=0)": 0.0, "every row (tokens=1.0)": 1.0}
    number = itertools.count()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
    with scratch() as folder:
        for i in range(repeats):
            for name, tokens in modes.items():
                run = folder / f"run{next(number)}"
                found[name].append(direct(model, batches, run, tokens))
            progress(f"repeat {i + 1} of {repeats}")
        pairs = {}
        for name, tokens in modes.items():
            run = folder / f"run{next(number)}"
            pairs[name] = whole(model, batches[0], run, tokens, rounds)
            progress(f"whole process, {name}")
    lines = []
    for name, runs in found.items():
        m = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        ratio = pairs[name].ratio
        report.numbers[name] = m | {"runs": runs, "whole_process": pairs[name].as_dict()}
        shares = [f"{m[key]:.2%}" for key in ("hooks", "writer", "both")]
        lines.append([name, f"{m['model_ms_per_forward']:.0f} ms", *shares, f"{ratio:.3f}"])
    table(
        ["CPU over the model's own", "model", "hooks", "writer", "both", "whole process"],
        lines,
    )
    print("(whole process of what is not recorded: the A/A pair; the others end with a flush)")
    for name, bound in (("counts (tokens=0)", 0.01), ("every row (tokens=1.0)", 0.04)):
        report.gate(f"hooks and writer, {name}", report.numbers[name]["both"], at_most=bound)
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())

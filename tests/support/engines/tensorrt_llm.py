"""Counts of TensorRT-LLM's ExpertStatistic, as tensorrt_llm/_torch/expert_statistic.py writes them.

Quoted at 0fccc5b (August 2026): `_maybe_add_info` makes `meta_info` of num_experts and
num_experts_per_token and adds `torch.bincount(ids, minlength=expert_count)` (int64, [experts]) to
the key "{iteration}_{layer}"; `_set_iter` writes, at the end of the range, meta_info.json on rank 0
and `rank{rank}.safetensors`. A branch of it (`feat`, with co-occurrence) keeps int32.

    python tests/support/engines/tensorrt_llm.py EXPERT_STATISTIC.PY OUT

writes `tests/data/engines/tensorrt_llm` with that file's own code; only its `envs` and `logger` are
stand-ins. `test_tensorrt_llm` holds that `write_counts` writes the same.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXPERTS, TOP_K, RANKS = 6, 2, 2
STEPS, BLOCKS = (100, 101, 102), (3, 4, 5)

Counts = dict[str, NDArray[Any]]


def drawn(rank: int, step: int, block: int) -> NDArray[np.int64]:
    """`[T, K]`: the choices of one layer of an iteration, different experts for each token."""
    rng = np.random.default_rng((rank, step, block))
    tokens = 4 + rank + step % 3
    return np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :TOP_K]


def counted(
    rank: int, steps: Iterable[int] = STEPS, blocks: Iterable[int] = BLOCKS, dtype: Any = np.int64
) -> Counts:
    """What a rank counts of `drawn`, by a plain loop."""
    out: Counts = {}
    blocks = tuple(blocks)
    for step in steps:
        for block in blocks:
            count_E = out.setdefault(f"{step}_{block}", np.zeros(EXPERTS, dtype))
            for token in drawn(rank, step, block).tolist():
                for expert in token:
                    count_E[expert] += 1
    return out


def write_counts(folder: Path, ranks: dict[int, Counts]) -> Path:
    """Write ranks' files and rank 0's meta_info.json; the folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    meta = {"num_experts": EXPERTS, "num_experts_per_token": TOP_K}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank, counts in ranks.items():
        save_file(counts, folder / f"rank{rank}.safetensors")
    return folder


def _write_with(source: Path, out: Path) -> None:
    import safetensors.torch  # noqa: F401  the file takes it for granted
    import torch

    envs, logger = types.ModuleType("tensorrt_llm.envs"), types.ModuleType("tensorrt_llm.logger")
    envs.get_env = {"EXPERT_STATISTIC_PATH": str(out)}.get  # type: ignore[attr-defined]
    logger.logger = types.SimpleNamespace(info=print)  # type: ignore[attr-defined]
    package = types.ModuleType("tensorrt_llm")
    package.envs = envs  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, envs.__name__: envs, logger.__name__: logger}
    names: dict[str, Any] = {}
    exec(compile(source.read_text(), source, "exec"), names)
    for rank in range(RANKS):
        statistic = names["ExpertStatistic"](rank, STEPS[0], STEPS[-1] + 1)
        for step in (STEPS[0] - 1, *STEPS, STEPS[-1] + 1):
            statistic._set_iter(step)
            for block in BLOCKS:
                statistic._set_layer(block)
                ids_TK = torch.from_numpy(drawn(rank, step, block)).to(torch.int32)
                for chunk in (ids_TK[:3], ids_TK[3:]):  # what is too long for one adds up
                    statistic._maybe_add_info(EXPERTS, chunk)


if __name__ == "__main__":
    _write_with(Path(sys.argv[1]), Path(sys.argv[2]))

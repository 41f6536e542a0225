"""What reading another recorder's file costs, and whether memory stays flat.

Files in the peers' layouts (the builders of `tests/support/engines`, which are tested against what
the peers' own code wrote) hold 10 million token-layers of realistic routing (48 layers x 128
experts x top-8), and twice as many. Each is imported by a process of its own; what it took is the
CPU time of that process, its start and imports included, and its largest anonymous resident memory
(mapped files are the page cache's). Gates: at most 60 s of CPU for 10 million from each binary
format; at most 0.25 GB more memory for twice as many, of any format (10 million are 208 requests of
1,024 tokens, 256 run at a time; the peaks of one file differ by 0.1 GB from run to run).

Requests decoded one at a time make a forward of every token, 213,000 of them, each with counts of
its own (100 rows of `load`): "single tokens", at most 90 s.

Formats that are text (Megatron's JSONL, moe-policylang's JSONL, llama.cpp's CSV) are measured
beside them, without a gate of time. Counts alone (SGLang stat, TensorRT-LLM) are of as many
token-layers, in passes of 8,192 tokens.

    python benchmarks/importing.py [--quick]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _common import Report, is_quick, progress, scratch, table
from numpy.typing import NDArray
from routing_generator import RoutingGenerator, Shape

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.engines import megatron_trace, sglang, vllm_answers  # noqa: E402

L, E, K = 48, 128, 8
T = 8192
"""Tokens of a pass."""

PROMPT, GENERATED = 768, 257
"""Tokens of a request."""

CHILD = """
import json, resource, sys, threading, time
from pathlib import Path
from moe_lens.importers.batching import Batching
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Given

peak, over = 0, threading.Event()
def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
def watch():
    global peak
    while not over.wait(0.005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch); thread.start()
given, batching = Given(**json.loads(sys.argv[4])), Batching(**json.loads(sys.argv[5]))
done = import_trace(sys.argv[1], sys.argv[2], format=sys.argv[3], given=given, batching=batching)
over.set(); thread.join()
took = {"cpu_s": time.process_time(), "peak": peak}
print(json.dumps(took | {"token_layers": done.token_layers, "forwards": done.passes}))
"""

Write = Callable[[Path, int], Path]


@dataclass(frozen=True)
class Case:
    """A format: how a file of so many token-layers is written, and what must be given.

    Attributes:
        at_most: Seconds of CPU for 10 million token-layers; None: no gate.
        given, batching: Arguments of `Given` and `Batching`.
    """

    name: str
    format: str
    write: Write
    at_most: float | None
    given: dict[str, Any]
    batching: dict[str, int] = field(default_factory=dict)


class Routing:
    """Choices `[T, L, K]`, one pass after the other: a few are generated, and go round."""

    def __init__(self) -> None:
        shape = Shape(layers=L, experts=E, top_k=K, requests=16, positions=T // 16)
        generator = RoutingGenerator(shape)
        self._passes = [self._of(next(generator.forwards(1))) for _ in range(2)]

    @staticmethod
    def _of(forward: Any) -> NDArray[np.uint8]:
        rows = [x.rows.expert_ids_NK for x in forward.layers]
        return np.ascontiguousarray(np.stack(rows, 1).astype(np.uint8))

    def passes(self, token_layers: int) -> Iterator[NDArray[np.uint8]]:
        for i in range(-(-token_layers // (T * L))):
            yield np.roll(self._passes[i % 2], 977 * i, axis=0)

    def requests(self, token_layers: int) -> Iterator[NDArray[np.uint8]]:
        rows = PROMPT + GENERATED - 1
        for ids_TLK in self.passes(token_layers):
            for first in range(0, T - rows + 1, rows):
                yield ids_TLK[first : first + rows]


ROUTING = Routing()


def sglang_per_token(path: Path, size: int) -> Path:
    import torch

    map_BP = sglang.trivial(L, E)
    records = []
    for i, ids_TLK in enumerate(ROUTING.passes(size)):
        ids_LTK = np.ascontiguousarray(ids_TLK.transpose(1, 0, 2), np.int32)
        count_LE = np.stack([np.bincount(x.ravel(), minlength=E) for x in ids_LTK])
        lengths = [T // 16] * 16
        records.append(
            {
                "forward_pass_id": i,
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": list(range(T)),
                "positions": [p for n in lengths for p in range(n)],
                "extend_seq_lens": lengths,
                "forward_mode": sglang.EXTEND,
                "topk_ids_of_layer": torch.from_numpy(ids_LTK),
                "misc_objects": [],
                "global_physical_count": torch.from_numpy(count_LE.astype(np.int32)),
            }
        )
    data = {"records": records, "last_physical_to_logical_map": torch.tensor(map_BP)}
    return sglang.save(path / "expert_distribution_recorder_1.5_0.pt", data)


def sglang_stat(path: Path, size: int) -> Path:
    counts = [
        np.stack([np.bincount(ids_TLK[:, i].ravel(), minlength=E) for i in range(L)])
        for ids_TLK in ROUTING.passes(size)
    ]
    return sglang.save(path / "expert_distribution_recorder_1.5.pt", sglang.stat(counts))


def sglang_responses(path: Path, size: int) -> Path:
    out = path / "responses.jsonl"
    with out.open("w") as f:
        for i, ids_TLK in enumerate(ROUTING.requests(size)):
            f.write(json.dumps(sglang.response(ids_TLK, PROMPT, GENERATED, f"r{i}")) + "\n")
    return out


def vllm_arrays(path: Path, size: int) -> Path:
    out = path / "arrays"
    out.mkdir()
    for i, ids_TLK in enumerate(ROUTING.requests(size)):
        np.save(out / f"r{i}.npy", ids_TLK)
    return out


def vllm_responses(path: Path, size: int, prompt_tokens: int = PROMPT) -> Path:
    out = path / "responses.jsonl"
    prompt, answer = list(range(prompt_tokens)), list(range(PROMPT + GENERATED - prompt_tokens))
    with out.open("w") as f:
        for i, ids_TLK in enumerate(ROUTING.requests(size)):
            served = vllm_answers.Served(prompt, [answer], name=f"r{i}", ids=[ids_TLK])
            f.write(json.dumps(served.completion()) + "\n")
    return out


def vllm_decoding(path: Path, size: int) -> Path:
    """Requests that are generated from their first token on."""
    return vllm_responses(path, size, prompt_tokens=1)


def tensorrt_llm(path: Path, size: int) -> Path:
    from safetensors.numpy import save_file

    out = path / "counts"
    out.mkdir()
    (out / "meta_info.json").write_text(json.dumps({"num_experts": E, "num_experts_per_token": K}))
    counts = {
        f"{i}_{layer}": np.bincount(ids_TLK[:, layer].ravel(), minlength=E).astype(np.int64)
        for i, ids_TLK in enumerate(ROUTING.passes(size))
        for layer in range(L)
    }
    save_file(counts, out / "rank0.safetensors")
    return out


def policylang(path: Path, size: int) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = path / "trace.parquet"
    scores = np.full((T * L, K), 1 / K, np.float32)
    schema = pa.schema(
        [
            ("prompt_id", pa.int32()),
            ("token_idx", pa.int32()),
            ("layer_idx", pa.int32()),
            ("selected_experts", pa.list_(pa.int32())),
            ("router_scores", pa.list_(pa.float32())),
        ]
    )
    offsets = np.arange(T * L + 1, dtype=np.int32) * K
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for i, ids_TLK in enumerate(ROUTING.passes(size)):
            ids_LTK = ids_TLK.transpose(1, 0, 2).astype(np.int32)  # layer by layer, as its hooks
            columns = [
                np.full(T * L, i, np.int32),
                np.tile(np.arange(T, dtype=np.int32), L),
                np.repeat(np.arange(L, dtype=np.int32), T),
                pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids_LTK.ravel())),
                pa.ListArray.from_arrays(pa.array(offsets), pa.array(scores.ravel())),
            ]
            arrays = [pa.array(x) if isinstance(x, np.ndarray) else x for x in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return out


def megatron(path: Path, size: int) -> Path:
    fired = [
        megatron_trace.Fired(i, layer, np.sort(ids_TLK[:, layer], 1))
        for i, ids_TLK in enumerate(ROUTING.passes(size))
        for layer in range(L)
    ]
    return megatron_trace.write_rank(path / "trace", fired).parent


MODEL = {"experts": E, "top_k": K, "blocks": L}
CASES = [
    Case("SGLang per_token (.pt)", "sglang", sglang_per_token, 60, {}),
    Case("SGLang stat (.pt)", "sglang", sglang_stat, 60, {"top_k": K}),
    Case("SGLang responses (base64)", "sglang-responses", sglang_responses, 60, MODEL),
    Case("vLLM arrays (.npy)", "vllm", vllm_arrays, 60, MODEL),
    Case("vLLM responses (base64)", "vllm", vllm_responses, 60, MODEL),
    Case("TensorRT-LLM (safetensors)", "tensorrt-llm", tensorrt_llm, 60, {}),
    Case("moe-policylang (Parquet)", "moe-policylang", policylang, 60, {"experts": E}),
    Case("vLLM responses, single tokens", "vllm", vllm_decoding, 90, MODEL, {"sequences": 1}),
    Case("Megatron-Core (JSONL)", "megatron", megatron, None, {"experts": E}),
]


def run(case: Case, path: Path, size: int) -> dict[str, Any]:
    """Write a file and import it; what the process took."""
    path.mkdir()
    written = case.write(path, size)
    files = [written] if written.is_file() else [p for p in written.rglob("*") if p.is_file()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.run(
        [
            sys.executable, "-c", CHILD,
            str(written), str(path / "run"), case.format, json.dumps(case.given),
            json.dumps(case.batching),
        ],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        raise SystemExit(f"{case.name}: {child.stderr}")
    took: dict[str, Any] = json.loads(child.stdout)
    took["file_bytes"] = sum(p.stat().st_size for p in files)
    return took


def main() -> int:
    quick = is_quick(__doc__)
    full = 800_000 if quick else 10_000_000
    setup = {
        "layers": L, "experts": E, "top_k": K, "tokens_of_a_pass": T,
        "prompt": PROMPT, "generated": GENERATED, "token_layers": full,
    }  # fmt: skip
    report = Report("importing", setup, ("torch", "safetensors"))
    rows = []
    for case in CASES:
        progress(case.name)
        with scratch() as folder:
            whole = run(case, folder / "whole", full)
            twice = run(case, folder / "twice", 2 * full)
        report.numbers[case.name] = {"whole": whole, "twice": twice}
        rows.append(
            [
                case.name,
                f"{whole['token_layers'] / 1e6:.1f} M",
                f"{whole['file_bytes'] / 1e6:,.0f} MB",
                f"{whole['cpu_s']:.1f}",
                f"{twice['cpu_s']:.1f}",
                f"{whole['peak'] / 1e9:.2f} GB",
                f"{twice['peak'] / 1e9:.2f} GB",
            ]
        )
        if quick:
            continue
        if case.at_most is not None:
            report.gate(f"{case.name}: CPU s", whole["cpu_s"], at_most=case.at_most)
        more = (twice["peak"] - whole["peak"]) / 1e9
        report.gate(f"{case.name}: GB more for twice as many", more, at_most=0.25)
    table(["format", "token-layers", "file", "CPU s", "of twice", "memory", "of twice"], rows)
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())

"""Writes `tests/data/engines/sglang/` with SGLang 0.5.23's own code, on a CPU and without a server.

    python tests/support/engines/make_sglang.py FOLDER-OF-THE-UNPACKED-WHEEL OUT

`eplb/expert_distribution.py`, `state_capturer/base.py` and `entrypoints/openai/protocol.py` run as
they are (torch, einops, pydantic, msgspec and openai must be there). The rest of SGLang wants the
packages of a GPU: its modules are empty stand-ins, but for `ForwardMode`, `Withable` and
`_b64_encode_per_request`, which are taken out of their files by name. `truth.json` says what the
recorder's hooks and the capturer were given: by pass or response and decoder block, ids by token.
"""

from __future__ import annotations

import ast
import base64
import enum
import importlib.util
import json
import sys
import types
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, Optional, TypeVar
from unittest import mock

import torch

LAYERS, EXPERTS, TOP_K = 3, 8, 2
DENSE = (0,)
PASSES: tuple[
    tuple[str, list[int], list[int]], ...
] = (  # forward mode, tokens of each sequence, first positions
    ("EXTEND", [5, 3], [0, 4]),
    ("DECODE", [1, 1], [5, 7]),
    ("MIXED", [4, 1], [0, 6]),
    ("IDLE", [], []),
    ("DECODE", [1, 1, 1], [4, 7, 8]),
)
"""A dump of five passes, the fourth of them without tokens."""


class _Empty(types.ModuleType):
    """Stands for a module of SGLang: any name in it is there and does nothing."""

    __path__ = []  # noqa: RUF012  (it is a package)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {}) if name[0].isupper() else mock.MagicMock(name=name)
        setattr(self, name, made)
        return made


class _Finder:
    """Finds every `sglang` module: as it is where it is in `real`, else empty."""

    def __init__(self, wheel: Path, real: set[str]) -> None:
        self._wheel, self._real = wheel, real

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "sglang" and name != "pybase64":
            return None
        if name in self._real:
            file = self._wheel / (name.replace(".", "/") + ".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.util.spec_from_loader(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def load(wheel: Path) -> SimpleNamespace:
    """SGLang's recorder, capturer and response classes.

    Args:
        wheel: Folder that has `sglang/srt`.
    """
    real = {
        "sglang.srt.eplb.expert_distribution",
        "sglang.srt.state_capturer.base",
        "sglang.srt.entrypoints.openai.protocol",
    }
    sys.meta_path.insert(0, _Finder(wheel, real))
    srt = wheel / "sglang" / "srt"
    pool = import_module("sglang.srt.mem_cache.pool_host.common")
    batch = import_module("sglang.srt.model_executor.forward_batch_info")
    context = import_module("sglang.srt.runtime_context")
    utils = import_module("sglang.srt.utils")

    names: dict[str, Any] = {"IntEnum": enum.IntEnum, "auto": enum.auto}
    mode = _taken(srt / "model_executor/forward_batch_info.py", "ForwardMode", names)
    names = {
        "Generic": Generic,
        "T": TypeVar("T"),
        "Optional": Optional,
        "contextmanager": contextmanager,
    }
    withable = _taken(srt / "utils/common.py", "Withable", names)
    _put(batch, ForwardMode=mode)
    _put(
        utils,
        Withable=withable,
        get_device=lambda: "cpu",
        is_cuda=lambda: False,
        is_hip=lambda: False,
    )
    _put(pool, ALLOC_MEMORY_FUNCS={"cpu": _allocate})
    _put(
        context,
        get_platform=lambda: SimpleNamespace(is_hip=False),
        get_device=lambda: SimpleNamespace(device="cpu"),
        get_schedule=lambda: SimpleNamespace(chunked_prefill_size=16),
        reports_expert_balancedness=lambda: False,
    )
    device = SimpleNamespace(empty_cache=lambda: None, is_current_stream_capturing=lambda: False)
    _put(torch, get_device_module=lambda device_name=None: device)
    _put(torch.distributed, all_reduce=lambda x, op=None: None)  # one rank
    recorder = import_module("sglang.srt.eplb.expert_distribution")
    protocol = import_module("sglang.srt.entrypoints.openai.protocol")
    capturer = import_module("sglang.srt.state_capturer.base")

    encode = _taken(
        srt / "managers/detokenizer_manager.py",
        "_b64_encode_per_request",
        {"Optional": Optional, "List": list, "torch": torch, "pybase64": base64},
    )
    return SimpleNamespace(
        recorder=recorder,
        capturer=capturer,
        protocol=protocol,
        ForwardMode=mode,
        encode=getattr(encode, "__func__", encode),
    )


def _put(module: Any, **names: Any) -> None:
    for name, value in names.items():
        setattr(module, name, value)


def _allocate(shape: Any, dtype: Any, device: str, pin_memory: bool, allocator: Any) -> Any:
    return torch.zeros(shape, dtype=dtype)


def _taken(file: Path, name: str, names: dict[str, Any]) -> Any:
    """One class or function of a file, run alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            space = {"__name__": name, **names}
            exec(compile(ast.Module([node], []), str(file), "exec"), space)
            return space[name]
    raise SystemExit(f"{file} has no {name}")


def metadata(map_LP: torch.Tensor, logical: int, ep_size: int = 1) -> SimpleNamespace:
    """What the recorder asks of ExpertLocationMetadata."""
    layers, physical = map_LP.shape
    return SimpleNamespace(
        physical_to_logical_map=map_LP,
        num_layers=layers,
        num_physical_experts=physical,
        num_local_physical_experts=physical // ep_size,
        num_logical_experts=logical,
        ep_size=ep_size,
    )


def recorder_of(sglang: SimpleNamespace, mode: str, where: Path, rank: int = 0, **more: Any) -> Any:
    """A recorder in one of its four modes, which dumps into `where`."""
    moe = SimpleNamespace(
        expert_distribution_recorder_mode=mode,
        expert_distribution_recorder_buffer_size=more.get("buffer", 8),
        moe_a2a_backend="deepep" if mode == "stat_approx" else "none",
        deepep_mode="normal",
        eplb_min_rebalancing_utilization_threshold=1.0,
    )
    settings = SimpleNamespace(moe=moe, overlap=SimpleNamespace(enable_two_batch_overlap=False))
    sglang.recorder.get_exec = lambda: settings
    folder = SimpleNamespace(get=lambda: str(where))
    sglang.recorder.envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR = folder
    _put(torch.distributed, get_rank=lambda group=None: rank)
    map_LP = more.get("map_LP")
    if map_LP is None:
        map_LP = torch.arange(EXPERTS).repeat(LAYERS, 1)
    return sglang.recorder._ExpertDistributionRecorderReal(metadata(map_LP, EXPERTS), rank)


Truth = dict[int, list[list[int]]]
"""Ids by token, by decoder block."""


def run(sglang: SimpleNamespace, recorder: Any, first_pass: int = 7, seed: int = 0) -> list[Truth]:
    """Five passes through the recorder's own hooks, with random choices, and a dump."""
    truth: list[Truth] = []
    draw = torch.Generator().manual_seed(seed)
    recorder.start_record()
    for i, (mode, lengths, firsts) in enumerate(PASSES):
        T = sum(lengths)
        positions = [p + j for n, p in zip(lengths, firsts, strict=True) for j in range(n)]
        batch = SimpleNamespace(
            input_ids=torch.randint(0, 1000, (T,), generator=draw),
            positions=torch.tensor(positions, dtype=torch.int64),
            extend_seq_lens_cpu=lengths if mode in ("EXTEND", "MIXED") else None,
            forward_mode=sglang.ForwardMode[mode],
        )
        truth.append({})
        with recorder.with_forward_pass(first_pass + i, batch):
            for layer in range(LAYERS):
                if layer in DENSE or not T:
                    continue
                ids_TK = torch.rand(T, EXPERTS, generator=draw).topk(TOP_K).indices
                truth[-1][layer] = ids_TK.tolist()
                with recorder.with_current_layer(layer):
                    recorder.on_select_experts(topk_ids=ids_TK.int())
                    counts = torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
                    recorder.on_deepep_dispatch_normal(
                        counts.tolist(), torch.tensor([T]), None, counts
                    )
    recorder.dump_record(output_mode="file")
    return truth


def response(
    sglang: SimpleNamespace, rid: str, prompt: int, completion: int, seed: int, start: int = 0
) -> tuple[dict[str, Any], Truth]:
    """A `/generate` response, rows out of the capturer's host cache and encoded, and its truth."""
    draw = torch.Generator().manual_seed(seed)
    n = prompt + completion
    truth: Truth = {}
    host = sglang.capturer.BaseTopkCapturer(64, 64, LAYERS, TOP_K, "cpu", "routed_experts")
    slots = torch.randperm(64, generator=draw)[: n - 1]
    for layer in range(LAYERS):
        if layer not in DENSE:
            ids_TK = torch.rand(n - 1, EXPERTS, generator=draw).topk(TOP_K).indices
            host.capture(layer, ids_TK.int())
            truth[layer] = ids_TK[start:].tolist()
    host.on_forward_end(
        SimpleNamespace(out_cache_loc=slots, out_cache_loc_virtual=None), False, None
    )
    pool = SimpleNamespace(req_to_token=torch.cat([slots, slots[:1]])[None])
    rows = host.get_topk(0, n, pool, start)
    answer = {
        "text": " words" * completion,
        "output_ids": list(range(100, 100 + completion)),
        "meta_info": {  # the keys of managers/tokenizer_manager.py, _handle_batch_output
            "id": rid,
            "finish_reason": {"type": "length", "length": completion},
            "prompt_tokens": prompt,
            "weight_version": "default",
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": completion,
            "cached_tokens": 0,
            "routed_experts": sglang.encode([rows])[0],
        },
    }
    return answer, truth


def chat(sglang: SimpleNamespace, generated: dict[str, Any]) -> str:
    """The answer of `/v1/chat/completions` to a request for routed experts and token ids."""
    p, meta = sglang.protocol, generated["meta_info"]
    text = p.ChatMessage(role="assistant", content=generated["text"])
    choice = p.ChatCompletionResponseChoice(index=0, message=text, finish_reason="length")
    ext = p.SglExt(
        routed_experts=meta["routed_experts"],
        input_ids=list(range(meta["prompt_tokens"])),
        output_ids=[generated["output_ids"]],
    )
    return _dumped(p, p.ChatCompletionResponse, meta, choice, ext)


def completion(sglang: SimpleNamespace, generated: dict[str, Any]) -> str:
    """The answer of `/v1/completions` to a request for routed experts."""
    p, meta = sglang.protocol, generated["meta_info"]
    choice = p.CompletionResponseChoice(index=0, text=generated["text"], finish_reason="length")
    return _dumped(
        p, p.CompletionResponse, meta, choice, p.SglExt(routed_experts=meta["routed_experts"])
    )


def _dumped(p: Any, kind: Any, meta: dict[str, Any], choice: Any, ext: Any) -> str:
    usage = p.UsageInfo(
        prompt_tokens=meta["prompt_tokens"],
        completion_tokens=meta["completion_tokens"],
        total_tokens=meta["prompt_tokens"] + meta["completion_tokens"],
    )
    answer = kind(id=meta["id"], created=0, model="m", choices=[choice], usage=usage, sglext=ext)
    return str(answer.model_dump_json())


def main() -> None:
    wheel, out = Path(sys.argv[1]), Path(sys.argv[2])
    sglang = load(wheel)
    truth: dict[str, Any] = {}
    for mode in ("stat", "stat_approx", "per_pass", "per_token"):
        truth[mode] = run(sglang, recorder_of(sglang, mode, out / mode))
        (file,) = (out / mode).iterdir()
        file.rename(out / f"{mode}.pt")
        (out / mode).rmdir()
    answered = [response(sglang, f"request-{i}", 4 + i, 3, seed=i) for i in range(3)]
    responses, truth["responses"] = [x for x, _ in answered], [x for _, x in answered]
    (out / "truth.json").write_text(json.dumps(truth), encoding="utf-8")
    (out / "responses.json").write_text(json.dumps(responses), encoding="utf-8")
    openai = [chat(sglang, responses[0]), completion(sglang, responses[1])]
    (out / "openai.jsonl").write_text("\n".join(openai) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

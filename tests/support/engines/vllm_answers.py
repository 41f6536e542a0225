"""What vLLM 0.33 answers with `--enable-return-routed-experts`, built after its source.

- the array: `[tokens, decoder blocks, top-k]`, uint8 up to 256 experts and uint16 above, zeros in
  blocks without experts (vllm/model_executor/layers/fused_moe/routed_experts_capturer.py, lines 69,
  80), one row for each token but the last (vllm/distributed/aux_output_connector/connector.py,
  `take_output`), from `routed_experts_prompt_start` on (line 104)
- in base64: vllm/utils/serial_utils.py, line 67
- completions and chats: vllm/entrypoints/openai/{completion,chat_completion}/protocol.py, lines 675
  and 113; usage: vllm/entrypoints/serve/engine/protocol.py, line 135
- `/inference/v1/generate`: vllm/entrypoints/scale_out/token_in_token_out/protocol.py, line 593
- lines of `vllm run-batch`: vllm/entrypoints/launchers/run_batch.py, line 226
- `RequestOutput`: vllm/outputs.py, line 137

tests/data/engines/vllm/completions.jsonl is what vLLM's own code (0.32.0, CPU) wrote: five
responses, by `vllm_live.py`; test_vllm.py holds what is built here against it.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OWN = Path(__file__).parents[2] / "data" / "engines" / "vllm" / "completions.jsonl"


def choices(
    T: int, *, B: int = 4, K: int = 2, E: int = 16, dense: tuple[int, ...] = (0,), seed: int = 0
) -> NDArray[Any]:
    """Random routing of a sequence, as the capturer's snapshot."""
    g = np.random.default_rng([seed, T])
    ids = np.argsort(g.random((T, B, E)), axis=-1)[..., :K]
    ids[:, list(dense)] = 0
    return ids.astype(np.uint8 if E <= 256 else np.uint16)


def numpy2base64(array: NDArray[Any]) -> str:
    with io.BytesIO() as buffer:
        np.save(buffer, array, allow_pickle=False)
        return base64.b64encode(buffer.getbuffer()).decode("ascii")


def usage(prompt: int, generated: int, cached: int | None = None) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + generated,
        "completion_tokens": generated,
        "prompt_tokens_details": details,
    }


@dataclass
class Served:
    """A request and what was answered."""

    prompt: list[int]
    outputs: list[list[int]]
    name: str = "cmpl-0"
    start: int = 0
    cached: int | None = None
    ids: list[NDArray[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.ids:
            rows = [len(self.prompt) + len(x) - 1 - self.start for x in self.outputs]
            self.ids = [choices(n, seed=i) for i, n in enumerate(rows)]

    @property
    def usage(self) -> dict[str, Any]:
        return usage(len(self.prompt), sum(map(len, self.outputs)), self.cached)

    def completion(self, *, token_ids: bool = False) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "text_completion",
            "created": 0,
            "model": "tiny",
            "choices": [
                {
                    "index": i,
                    "text": "…",
                    "finish_reason": "length",
                    "token_ids": x if token_ids else None,
                    "prompt_token_ids": self.prompt if token_ids else None,
                    "routed_experts": numpy2base64(ids),
                }
                for i, (x, ids) in enumerate(zip(self.outputs, self.ids, strict=True))
            ],
            "usage": self.usage,
        }

    def chat(self, *, token_ids: bool = False) -> dict[str, Any]:
        said = self.completion(token_ids=token_ids) | {"object": "chat.completion"}
        for choice in said["choices"]:
            del choice["text"], choice["prompt_token_ids"]
            choice["message"] = {"role": "assistant", "content": "…"}
        return said | {"prompt_token_ids": self.prompt if token_ids else None}

    def generate(self) -> dict[str, Any]:
        said = self.completion(token_ids=True)
        for choice in said["choices"]:
            del choice["text"], choice["prompt_token_ids"]
        return {
            "request_id": self.name,
            "usage": self.usage,
            "prompt_token_ids": self.prompt,
            "output_mode": "tokens",
            "choices": said["choices"],
        }

    def batch_line(self) -> dict[str, Any]:
        return {
            "id": "vllm-0",
            "custom_id": self.name,
            "response": {"status_code": 200, "request_id": "vllm-batch-0", "body": self.chat()},
            "error": None,
        }

    def request_output(self) -> dict[str, Any]:
        """The fields of a `RequestOutput`, as one may dump them."""
        return {
            "request_id": self.name,
            "prompt_token_ids": self.prompt,
            "num_cached_tokens": self.cached,
            "outputs": [
                {"index": i, "token_ids": x, "routed_experts": ids.tolist()}
                for i, (x, ids) in enumerate(zip(self.outputs, self.ids, strict=True))
            ],
        }


@dataclass
class CompletionOutput:
    """The fields of vLLM's that are read, by its names."""

    index: int
    token_ids: list[int]
    routed_experts: NDArray[Any] | None
    finish_reason: str | None = "length"


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int | None = None
    finished: bool = True


def output_of(served: Served) -> RequestOutput:
    """The objects that `LLM.generate` returns."""
    made = [
        CompletionOutput(i, x, ids)
        for i, (x, ids) in enumerate(zip(served.outputs, served.ids, strict=True))
    ]
    return RequestOutput(served.name, served.prompt, made, served.cached)

"""Where the routed experts are in a response of SGLang 0.5.23.

`/generate` (srt/managers/tokenizer_manager.py, line 2602): `meta_info.routed_experts`, beside
`id`, `prompt_tokens` and `completion_tokens`. The OpenAI API: with return_meta_info the same in
`choices[].meta_info` (entrypoints/openai/serving_chat.py, line 2986); else one for the whole
response, of its first choice, in `sglext.routed_experts` (line 2857, and serving_completions.py,
line 550). All are base64 of int32 (srt/managers/detokenizer_manager.py, line 443).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.source import Ints


@dataclass
class Response:
    """One request's routing, not yet in rows.

    Attributes:
        where: Its place in the file, for errors.
        request: Its id; None: not there.
        ids: All ids, one after another.
        token_id_T: Vocabulary ids of prompt and completion; None: not there.
        cached: Tokens at its beginning that came out of the prefix cache: no expert ran for them.
    """

    where: str
    request: str | None
    prompt_tokens: int
    completion_tokens: int
    ids: Ints
    token_id_T: NDArray[np.int64] | None
    cached: int = 0


def responses_of(raw: Any, where: str, path: Path) -> Iterator[Response]:
    """The requests of one response; several, where it has several choices.

    Raises:
        ImportRefused: It has no routed experts, or they are damaged.
    """
    place = f"{path}: {where}"
    if not isinstance(raw, dict):
        raise ImportRefused(f"{place} is a {type(raw).__name__}, not a response.")
    if raw.get("error") or raw.get("object") == "error":
        raise ImportRefused(f"{place} is an error that the server answered: leave it out.")
    if "meta_info" in raw:
        ids = raw.get("prompt_token_ids"), raw.get("output_ids")
        yield _of_meta(raw["meta_info"], where, path, ids)
        return
    choices = raw.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise ImportRefused(
            f"{place} has neither 'meta_info' nor 'choices': it is no response of SGLang."
        )
    if any("meta_info" in c for c in choices):
        for i, c in enumerate(choices):
            ids = c.get("prompt_token_ids"), c.get("response_token_ids")
            yield _of_meta(c.get("meta_info"), f"{where}, choice {i}", path, ids)
        return
    yield _of_extension(raw, choices, where, path)


def _of_meta(meta: Any, where: str, path: Path, ids: tuple[Any, Any]) -> Response:
    place = f"{path}: {where}"
    if not isinstance(meta, dict):
        raise ImportRefused(f"{place}: meta_info is a {type(meta).__name__}, not an object.")
    if "finish_reason" in meta and meta["finish_reason"] is None:
        raise ImportRefused(
            f"{place} is a part of a streamed response: keep the last part of each request."
        )
    prompt = _count(meta, "prompt_tokens", place)
    completion = _count(meta, "completion_tokens", place)
    return Response(
        where,
        _id(meta),
        prompt,
        completion,
        _decoded(meta.get("routed_experts"), place),
        _token_ids(*ids, prompt, completion, place),
        _cached(meta, prompt, place),
    )


def _of_extension(
    raw: dict[str, Any], choices: list[dict[str, Any]], where: str, path: Path
) -> Response:
    place = f"{path}: {where}"
    extension, usage = raw.get("sglext"), raw.get("usage")
    if not isinstance(extension, dict):
        raise ImportRefused(f"{place} has no 'sglext': {_ASK}")
    if len(choices) != 1:
        raise ImportRefused(
            f"{place} has {len(choices)} choices, but the routing of the first alone: ask for one "
            "choice (n = 1), or for return_meta_info."
        )
    if not isinstance(usage, dict):
        raise ImportRefused(f"{place} has no 'usage': its tokens are not known.")
    prompt = _count(usage, "prompt_tokens", place)
    completion = _count(usage, "completion_tokens", place)
    first, outputs = choices[0], extension.get("output_ids")
    of_first = outputs[0] if isinstance(outputs, list) and outputs else None
    prompt_ids = first.get("prompt_token_ids", extension.get("input_ids"))
    output_ids = first.get("response_token_ids", first.get("token_ids", of_first))
    return Response(
        where,
        _id(raw),
        prompt,
        completion,
        _decoded(extension.get("routed_experts"), place),
        _token_ids(prompt_ids, output_ids, prompt, completion, place),
        _cached(usage.get("prompt_tokens_details"), prompt, place),
    )


_ASK = (
    "start the server with --enable-return-routed-experts and ask with return_routed_experts=true."
)


def _decoded(text: Any, place: str) -> Ints:
    if text is None:
        raise ImportRefused(f"{place} has no 'routed_experts': {_ASK}")
    if not isinstance(text, str):
        raise ImportRefused(f"{place}: routed_experts is a {type(text).__name__}, not base64.")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise ImportRefused(f"{place}: routed_experts is no base64 ({e}): torn?") from e
    if len(raw) % 4:
        raise ImportRefused(f"{place}: routed_experts has {len(raw):,} bytes: no int32.")
    return np.frombuffer(raw, "<i4")


def _id(said: dict[str, Any]) -> str | None:
    return None if said.get("id") is None else str(said["id"])


def _cached(said: Any, prompt: int, place: str) -> int:
    """Of each request SGLang counts them once, however often it had to begin it again."""
    if not isinstance(said, dict) or said.get("cached_tokens") is None:
        return 0
    cached = _count(said, "cached_tokens", place)
    if cached > prompt:
        raise ImportRefused(f"{place}: {cached:,} cached tokens of a prompt of {prompt:,}.")
    return cached


def _count(said: dict[str, Any], name: str, place: str) -> int:
    value = said.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ImportRefused(f"{place}: {name} is {value!r}, not a number of tokens.")
    return value


def _token_ids(
    prompt_ids: Any, output_ids: Any, prompt: int, completion: int, place: str
) -> NDArray[np.int64] | None:
    if prompt_ids is None or output_ids is None:
        return None
    for name, ids, n in (("prompt", prompt_ids, prompt), ("output", output_ids, completion)):
        if not isinstance(ids, list) or not all(type(x) is int for x in ids):
            raise ImportRefused(f"{place}: the {name} token ids are no list of whole numbers.")
        if len(ids) != n:
            raise ImportRefused(f"{place}: {len(ids)} {name} token ids, but {n} {name} tokens.")
        if ids and not 0 <= min(ids) <= max(ids) < 1 << 31:
            raise ImportRefused(f"{place}: a {name} token id is out of range.")
    return np.array([*prompt_ids, *output_ids], np.int64)

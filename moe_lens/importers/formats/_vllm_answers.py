"""What vLLM (0.32, 0.33) answers with `--enable-return-routed-experts`: one answer into sequences.

An answer is a response of its OpenAI server (`choices[].routed_experts`, an .npy file in base64),
or a `RequestOutput` (`outputs[].routed_experts`, an array). The array is `[T, B, K]`: a row for
every decoder block, ids logical (taken before EPLB maps them), uint8 up to 256 experts, else
uint16. T is prompt + generated tokens - 1, since the last sampled token never ran, less the
`routed_experts_prompt_start` tokens that the request asked to leave out. Tokens out of the prefix
cache have rows too, those of the request that once ran them; where an answer says how many they
are (`num_cached_tokens`, `usage.prompt_tokens_details`) they are left out: no expert ran for them.

T tokens, B decoder blocks, L of them with experts, K choices of a token.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.blocks import Blocks
from moe_lens.importers.source import Sequence

SERVED = (
    "was the server started with --enable-return-routed-experts, and is this the whole answer "
    "(chunks of a stream have none)?"
)


DAMAGED = (ValueError, EOFError, MemoryError, OverflowError, TokenError)
"""What numpy raises over an .npy file whose header or length is not what it was."""


class NoRouting(ImportRefused):
    """A request that failed: nothing is wrong with what others answered."""


@dataclass(frozen=True)
class _Choice:
    """One generated sequence of an answer. None: the answer does not say."""

    where: str
    array: object
    request: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    prompt_ids: object
    output_ids: object
    start: int = 0
    cached: int = 0


def is_answer(said: object) -> bool:
    """Whether something read from JSON looks like an answer of vLLM, with routing or without."""
    if not isinstance(said, Mapping):
        return False
    body = _unwrapped(said)[0]
    if "custom_id" in said and (not isinstance(body, Mapping) or "error" in body):
        return True  # a request of a batch that failed
    if not isinstance(body, Mapping):
        return False
    inside = [x for x in _list(body.get("choices")) if isinstance(x, Mapping)]
    if inside:
        return any("routed_experts" in x for x in inside) and "sglext" not in body
    return "outputs" in body or ("routed_experts" in body and "meta_info" not in body)


def sequences(
    said: Mapping[str, Any], blocks: Blocks, where: str, *, prompt_start: int | None = None
) -> list[Sequence]:
    """The sequences of one answer: one for each choice that ran.

    Args:
        said: A response, a line of `vllm run-batch`, or the fields of a `RequestOutput`.
        blocks: What its arrays are of.
        where: Its place in the file, for errors.
        prompt_start: The request's `routed_experts_prompt_start`, where it is not kept beside the
            answer; None: 0.

    Raises:
        ImportRefused: It has no routing, or what it has is damaged or does not fit its own token
            counts. `NoRouting`: because the request failed.
    """
    out = []
    for choice in _choices(said, where, prompt_start):
        ids_TLK = blocks.take(decoded(choice.array, choice.where), choice.where)
        out.append(_sequence(choice, ids_TLK))
    tag = said.get("tag")
    return [replace(x, tag=tag) for x in out] if isinstance(tag, str) else out


def shape(said: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """`[T, B, K]` of its first array; None: it has none since it was aborted.

    Raises:
        ImportRefused: As `sequences`.
    """
    for choice in _choices(said, where, None):
        return decoded(choice.array, choice.where).shape
    return None


def decoded(array: object, where: str) -> NDArray[Any]:
    """An array as an answer has it: base64 of an .npy file, nested lists, or the array itself.

    Raises:
        ImportRefused: It is none of these, or damaged.
    """
    if isinstance(array, str):
        try:
            file = io.BytesIO(base64.b64decode(array, validate=True))
        except (binascii.Error, ValueError) as e:
            raise ImportRefused(f"{where}: routed_experts is no base64 ({e}).") from e
        try:
            made: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        except DAMAGED as e:
            raise ImportRefused(f"{where}: routed_experts is no .npy file ({_line(e)}).") from e
        if left := len(file.read()):
            raise ImportRefused(f"{where}: {left} bytes follow the array of routed_experts.")
    else:
        try:
            made = np.asarray(array)
        except ValueError as e:
            raise ImportRefused(f"{where}: routed_experts is no array ({_line(e)}).") from e
    if made.dtype.kind not in "iu":
        raise ImportRefused(f"{where}: expert ids are {made.dtype}, not integers.")
    if not made.ndim:
        raise ImportRefused(f"{where}: routed_experts is the number {made}, not an array.")
    return made


def as_answer(output: object) -> dict[str, Any] | None:
    """The fields of a `RequestOutput` or `CompletionOutput`; None: it is neither.

    By their names alone: vLLM need not be importable.
    """
    if isinstance(found := getattr(output, "outputs", None), list):
        names = ("request_id", "prompt_token_ids", "num_cached_tokens", "finished")
        said = {name: getattr(output, name, None) for name in names}
        said["outputs"] = [_fields(x) for x in found]
        return said
    if hasattr(output, "routed_experts") and hasattr(output, "token_ids"):
        return {"outputs": [_fields(output)]}
    return None


def _fields(completion: object) -> dict[str, Any]:
    names = ("index", "token_ids", "routed_experts", "finish_reason")
    return {name: getattr(completion, name, None) for name in names}


# -- the layouts of answers ------------------------------------------------------------------------


def _choices(said: Mapping[str, Any], where: str, prompt_start: int | None) -> Iterator[_Choice]:
    body, request, start = _unwrapped(said)
    if not isinstance(body, Mapping) or body.get("error") is not None:
        error = said.get("error") if not isinstance(body, Mapping) else body["error"]
        raise NoRouting(f"{where}: the request failed ({_line(error)}), so it has no routing.")
    if start is None:
        start = prompt_start or 0
    start = _count(start, "routed_experts_prompt_start", where)
    if "choices" in body:
        found = _of_response(body, request, start, where)
    else:
        found = _of_output(body, request, start, where)
    for choice in found:
        if choice.array is None:
            raise ImportRefused(f"{choice.where}: no routed_experts: {SERVED}")
        yield choice


def _unwrapped(said: Mapping[str, Any]) -> tuple[Any, str | None, object]:
    """The answer itself, the request's id, and what the request said of its prompt's start."""
    asked = said.get("request")
    start = (asked if isinstance(asked, Mapping) else said).get("routed_experts_prompt_start")
    body: Any = said
    if "response" in said:  # a line of run-batch, or of someone who kept both
        body = said["response"]
        if isinstance(body, Mapping) and "body" in body:
            body = body["body"]
        if said.get("error") is not None:
            body = None
    inner = body if isinstance(body, Mapping) else {}
    names = (said.get("custom_id"), inner.get("request_id"), inner.get("id"), said.get("id"))
    return body, next((str(x) for x in names if x is not None), None), start


def _of_response(
    body: Mapping[str, Any], request: str | None, start: int, where: str
) -> list[_Choice]:
    choices = body["choices"]
    if not isinstance(choices, list) or not all(isinstance(x, Mapping) for x in choices):
        raise ImportRefused(f"{where}: its choices are no list of objects.")
    usage = body.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, Mapping) else {}
    one = len(choices) == 1
    # A chat has one prompt; a completion may have several, and its usage counts them together.
    of_all = usage.get("prompt_tokens") if one or "message" in choices[0:1][0] else None
    out = []
    for at, choice in enumerate(choices):
        prompt_ids = choice.get("prompt_token_ids", body.get("prompt_token_ids"))
        made = _Choice(
            where=where if one else f"{where}, choice {at}",
            array=choice.get("routed_experts"),
            request=request if one or request is None else f"{request}/{at}",
            prompt_tokens=_known(prompt_ids, of_all, "prompt_tokens", where),
            completion_tokens=_known(
                choice.get("token_ids"),
                usage.get("completion_tokens") if one else None,
                "completion_tokens",
                where,
            ),
            prompt_ids=prompt_ids,
            output_ids=choice.get("token_ids"),
            start=start,
            # Several choices share a prompt, and each found another part of it in the cache.
            cached=_count(details.get("cached_tokens") or 0, "cached_tokens", where) if one else 0,
        )
        if made.array is not None or choice.get("finish_reason") != "abort":
            out.append(made)
    if not one and len(out) == len(choices):
        n = _per_prompt(out, usage, where)
        if n == len(out):
            of_all = usage["prompt_tokens"]
            out = [x if x.prompt_tokens else replace(x, prompt_tokens=of_all) for x in out]
    return out


def _of_output(
    body: Mapping[str, Any], request: str | None, start: int, where: str
) -> list[_Choice]:
    outputs = body.get("outputs", [body])
    if not isinstance(outputs, list) or not all(isinstance(x, Mapping) for x in outputs):
        raise ImportRefused(f"{where}: its outputs are no list of objects.")
    one = len(outputs) == 1
    prompt_ids = body.get("prompt_token_ids")
    cached = _count(body.get("num_cached_tokens") or 0, "num_cached_tokens", where)
    return [
        _Choice(
            where=where if one else f"{where}, output {at}",
            array=x.get("routed_experts"),
            request=request if one or request is None else f"{request}/{at}",
            prompt_tokens=_known(prompt_ids, body.get("prompt_tokens"), "prompt_tokens", where),
            completion_tokens=_known(x.get("token_ids"), None, "token_ids", where),
            prompt_ids=prompt_ids,
            output_ids=x.get("token_ids"),
            start=start,
            cached=cached if one else 0,
        )
        for at, x in enumerate(outputs)
        if x.get("routed_experts") is not None or x.get("finish_reason") != "abort"
    ]


def _per_prompt(choices: list[_Choice], usage: Mapping[str, Any], where: str) -> int | None:
    """How many choices a prompt has, by the rows of all of them; None: usage does not say.

    Usage counts a prompt once, and what every choice generated.

    Raises:
        ImportRefused: No number of choices explains the rows.
    """
    prompt, generated = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(generated, int) or prompt < 1:
        return None
    rows = [len(decoded(x.array, x.where)) for x in choices if x.array is not None]
    if len(rows) < len(choices):
        return None
    ran = sum(rows) + sum(1 + x.start for x in choices)
    n, odd = divmod(ran - generated, prompt)
    if odd or n < 1 or len(choices) % n:
        raise ImportRefused(
            f"{where}: {sum(rows):,} rows in {len(choices)} choices do not add up to prompts of "
            f"{prompt:,} and {generated:,} generated tokens (each choice has one row less)."
        )
    return n


# -- one sequence ----------------------------------------------------------------------------------


def _sequence(c: _Choice, ids_TLK: NDArray[Any]) -> Sequence:
    T = len(ids_TLK)
    if c.prompt_tokens is not None and c.start > c.prompt_tokens:
        raise ImportRefused(
            f"{c.where}: {c.prompt_tokens:,} prompt tokens, but they begin at {c.start:,} "
            "(routed_experts_prompt_start)."
        )
    if c.prompt_tokens is not None and c.completion_tokens is not None:
        expected = max(c.prompt_tokens + c.completion_tokens - 1 - c.start, 0)
        if expected != T:
            raise ImportRefused(
                f"{c.where}: {T:,} rows of routing, but {expected:,} tokens ran (prompt "
                f"{c.prompt_tokens:,} + generated {c.completion_tokens:,} - 1"
                + (f" - {c.start:,} left out)" if c.start else ")")
                + ": it is a chunk of a stream; or the request had a routed_experts_prompt_start: "
                "keep it beside the answer, or say --first-position."
            )
    elif c.prompt_tokens is not None and c.prompt_tokens - c.start > T:
        raise ImportRefused(
            f"{c.where}: {T:,} rows of routing for a prompt of {c.prompt_tokens:,} tokens."
        )
    if c.prompt_tokens is not None and c.cached > c.prompt_tokens:
        raise ImportRefused(
            f"{c.where}: {c.cached:,} cached tokens of a prompt of {c.prompt_tokens:,}."
        )
    first = max(c.start, c.cached)
    ids_TLK = ids_TLK[first - c.start :]
    prompt = None if c.prompt_tokens is None else max(c.prompt_tokens - first, 0)
    token_id_T = None
    if c.prompt_ids is not None and c.output_ids is not None:
        both = [token_ids(c.prompt_ids, c.where), token_ids(c.output_ids, c.where)]
        token_id_T = np.concatenate(both)[first : first + len(ids_TLK)]
    return Sequence(
        where=c.where,
        ids_TLK=ids_TLK,
        first_position=first,
        prompt_tokens=prompt,
        token_id_T=token_id_T,
        request=c.request,
    )


def token_ids(said: Any, where: str) -> NDArray[np.int64]:
    """Vocabulary ids.

    Raises:
        ImportRefused: They are no list of numbers of 31 bits.
    """
    try:
        made = np.asarray(said if isinstance(said, np.ndarray) else list(said))
    except (TypeError, ValueError) as e:
        raise ImportRefused(f"{where}: token ids are no list of numbers ({_line(e)}).") from e
    if made.ndim != 1 or (made.size and made.dtype.kind not in "iu"):
        raise ImportRefused(f"{where}: token ids are no list of numbers.")
    if made.size and not 0 <= int(made.min()) <= int(made.max()) < 1 << 31:
        odd = made.min() if made.min() < 0 else made.max()
        raise ImportRefused(f"{where}: a token id is {odd}.")
    return made.astype(np.int64)


def _known(ids: Any, count: object, name: str, where: str) -> int | None:
    """How many tokens, by their ids or by usage; both must agree."""
    said = None if count is None else _count(count, name, where)
    if ids is None:
        return said
    try:
        n = len(ids)
    except TypeError as e:
        raise ImportRefused(f"{where}: token ids are no list of numbers.") from e
    if said is not None and said != n:
        raise ImportRefused(f"{where}: {n:,} token ids, but {name} is {said:,}.")
    return n


def _count(value: object, name: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ImportRefused(f"{where}: {name} is {value!r}, not a number of tokens.")
    return value


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _line(error: object) -> str:
    """An error in one line, and short."""
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else f"{text[:117]}…"

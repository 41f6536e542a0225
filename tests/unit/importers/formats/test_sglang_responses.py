"""Responses of SGLang: what its own code encoded, what a builder made after it, damaged files."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.engines.sglang import response

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats import format_of, sglang_responses
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Given, Sequence, Source

DATA = Path(__file__).parents[3] / "data/engines/sglang"
"""Encoded by SGLang 0.5.23's own capturer, detokenizer and response classes: make_sglang.py."""

TRUTH: list[dict[str, list[list[int]]]] = json.loads((DATA / "truth.json").read_text())["responses"]
B, K, E = 3, 2, 8
GIVEN = Given(experts=E, top_k=K, blocks=B, dense_blocks=(0,))
PROMPT, COMPLETION = 4, 3
T = PROMPT + COMPLETION - 1


def sequences(source: Source) -> list[Sequence]:
    out = list(source.ranks[0].items())
    assert all(isinstance(x, Sequence) for x in out)
    return out  # type: ignore[return-value]


def drawn(seed: int, tokens: int = T, top_k: int = K) -> NDArray[np.int64]:
    """Block 0 is dense: zeros, as the capturer leaves it."""
    ids_TBK = np.argsort(np.random.default_rng(seed).random((tokens, B, E)), axis=2)[:, :, :top_k]
    ids_TBK[:, 0] = 0
    return ids_TBK


def write(path: Path, *answers: Any) -> Path:
    path.write_text("\n".join(json.dumps(x) for x in answers) + "\n", encoding="utf-8")
    return path


def read(path: Path, given: Given = GIVEN) -> list[Sequence]:
    return sequences(sglang_responses.open_source(path, given))


# -- what SGLang's own code encoded ----------------------------------------------------------------


def test_responses_are_read_to_the_token() -> None:
    found = read(DATA / "responses.json")
    assert [x.request for x in found] == ["request-0", "request-1", "request-2"]
    for n, (item, truth) in enumerate(zip(found, TRUTH, strict=True)):
        assert item.ids_TLK[:, 0].tolist() == truth["1"]
        assert item.ids_TLK[:, 1].tolist() == truth["2"]
        assert len(item.ids_TLK) == (4 + n) + 3 - 1
        assert (item.first_position, item.prompt_tokens) == (0, 4 + n)
        assert item.token_id_T is None


def test_answers_of_the_openai_api_are_read() -> None:
    chat, completion = read(DATA / "openai.jsonl")
    for item, truth in ((chat, TRUTH[0]), (completion, TRUTH[1])):
        assert item.ids_TLK.transpose(1, 0, 2).tolist() == [truth["1"], truth["2"]]
    assert (chat.request, completion.request) == ("request-0", "request-1")
    assert chat.token_id_T is not None
    assert chat.token_id_T.tolist() == [0, 1, 2, 3, 100, 101]
    assert completion.token_id_T is None


def test_the_builder_writes_what_sglang_writes() -> None:
    real = json.loads((DATA / "responses.json").read_text())[0]
    ours = response(drawn(0), PROMPT, COMPLETION)
    assert list(real) == list(ours)
    assert list(real["meta_info"]) == list(ours["meta_info"])
    assert all(type(v) is type(ours["meta_info"][k]) for k, v in real["meta_info"].items())
    assert len(real["meta_info"]["routed_experts"]) == len(ours["meta_info"]["routed_experts"])


@pytest.mark.parametrize("name", ["responses.json", "openai.jsonl"])
def test_it_is_recognised_and_imported(name: str, tmp_path: Path) -> None:
    assert format_of(DATA / name) == "sglang-responses"
    done = import_trace(DATA / name, tmp_path / "run", given=GIVEN)
    rows = {"responses.json": 6 + 7 + 8, "openai.jsonl": 6 + 7}[name]
    assert (done.tokens, done.token_layers) == (rows, 2 * rows)


def test_other_json_is_not_recognised(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", {"choices": [], "prompt": 'says "meta_info"'})
    assert not sglang_responses.recognises(path, path.read_bytes())
    assert not sglang_responses.recognises(tmp_path, b"")


# -- every shape of a file -------------------------------------------------------------------------


def one(seed: int, rid: str = "r") -> dict[str, Any]:
    return response(drawn(seed), PROMPT, COMPLETION, rid)


@pytest.mark.parametrize(
    "shape", ["lines", "list", "indented list", "list a line", "one", "one after a blank line"]
)
def test_json_may_be_laid_out_in_any_way(shape: str, tmp_path: Path) -> None:
    answers = [one(i, f"r{i}") for i in range(1 if shape.startswith("one") else 4)]
    text = {
        "lines": "\n\n".join(json.dumps(x) for x in answers),
        "list": json.dumps(answers),
        "indented list": json.dumps(answers, indent=2),
        "list a line": f"{json.dumps(answers[:3])}\n{json.dumps(answers[3:])}\n",
        "one": json.dumps(answers[0], indent=1),
        "one after a blank line": "\n" + json.dumps(answers[0], indent=1),
    }[shape]
    path = tmp_path / "r.json"
    path.write_text(text, encoding="utf-8")
    found = read(path)
    assert [x.request for x in found] == [f"r{i}" for i in range(len(answers))]
    for i, item in enumerate(found):
        assert item.ids_TLK.tolist() == drawn(i)[:, 1:].tolist()


def test_choices_may_bring_their_own_meta_info(tmp_path: Path) -> None:
    choices = [
        {
            "index": i,
            "meta_info": one(i, f"r{i}")["meta_info"],
            "prompt_token_ids": [1, 2, 3, 4],
            "response_token_ids": [5, 6, 7],
        }
        for i in range(2)
    ]
    found = read(write(tmp_path / "c.json", {"id": "x", "choices": choices, "usage": {}}))
    assert [x.request for x in found] == ["r0", "r1"]
    assert found[1].ids_TLK.tolist() == drawn(1)[:, 1:].tolist()
    assert found[1].token_id_T is not None
    assert found[1].token_id_T.tolist() == [1, 2, 3, 4, 5, 6]


def test_responses_may_begin_at_a_position(tmp_path: Path) -> None:
    answer = response(drawn(0)[3:], PROMPT, COMPLETION, prompt_token_ids=[1, 2, 3, 4])
    path = write(tmp_path / "s.json", answer)
    (found,) = read(path, Given(experts=E, top_k=K, blocks=B, dense_blocks=(0,), first_position=3))
    assert found.ids_TLK.tolist() == drawn(0)[3:, 1:].tolist()
    assert (found.first_position, found.prompt_tokens) == (3, 1)
    assert found.token_id_T is not None
    assert found.token_id_T.tolist() == [4, 100, 101]
    with pytest.raises(
        ImportRefused, match=r"line 1: 3 rows, but 6 tokens ran \(4 \+ 3 - 1\).*--fi"
    ):
        read(path)


@pytest.mark.parametrize(("start", "first"), [(0, 3), (2, 3), (4, 4)])
def test_tokens_out_of_the_prefix_cache_are_left_out(
    start: int, first: int, tmp_path: Path
) -> None:
    answer = response(drawn(0)[start:], PROMPT, COMPLETION, prompt_token_ids=[1, 2, 3, 4])
    answer["meta_info"]["cached_tokens"] = 3
    given = Given(experts=E, top_k=K, blocks=B, dense_blocks=(0,), first_position=start)
    (item,) = read(write(tmp_path / "a.jsonl", answer), given)
    assert item.ids_TLK.tolist() == drawn(0)[first:, 1:].tolist()
    assert (item.first_position, item.prompt_tokens) == (first, PROMPT - first)
    assert item.token_id_T is not None
    assert item.token_id_T.tolist() == [1, 2, 3, 4, 100, 101][first:]


@pytest.mark.parametrize("cached", [PROMPT + 1, -1, "2"])
def test_cached_tokens_that_cannot_be_are_refused(cached: Any, tmp_path: Path) -> None:
    answer = response(drawn(0), PROMPT, COMPLETION)
    answer["meta_info"]["cached_tokens"] = cached
    with pytest.raises(ImportRefused, match=r"line 1: .*cached"):
        read(write(tmp_path / "a.jsonl", answer))


def test_a_prefill_alone_has_a_row_less_than_tokens(tmp_path: Path) -> None:
    (found,) = read(write(tmp_path / "p.json", response(drawn(0, 3), 4, 0)))
    assert (len(found.ids_TLK), found.prompt_tokens) == (3, 3)


@pytest.mark.parametrize(
    "given", [Given(experts=E, top_k=K), Given(experts=E, blocks=B), Given(experts=E, top_k=3)]
)
def test_what_is_not_given_comes_of_the_size(given: Given, tmp_path: Path) -> None:
    K = given.top_k or 2
    source = sglang_responses.open_source(
        write(tmp_path / "r.json", *(response(drawn(i, top_k=K), 4, 3, f"r{i}") for i in range(2))),
        given,
    )
    assert [(x.block, x.top_k) for x in source.layers] == [(b, K) for b in range(B)]
    assert sequences(source)[1].ids_TLK.tolist() == drawn(1, top_k=K).tolist()
    assert any("made out of the size" in note for note in source.notes)


# -- what is missing, or wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Given(top_k=K, blocks=B), "give --experts"),
        (Given(experts=E), "give --top-k"),
        (Given(experts=E, top_k=K, blocks=B, dense_blocks=(7,)), "there is no block 7 in 3"),
        (Given(experts=E, top_k=K, blocks=2), "line 1: 9 rows, but 6 tokens ran"),
        (Given(experts=E, top_k=4, blocks=B), "line 1: 3 rows, but 6 tokens ran"),
        (Given(experts=E, top_k=5, blocks=B), "line 1: 36 ids are no whole rows"),
        (Given(experts=E, top_k=5), r"36 ids are not 6 rows .* of a multiple of 5"),
        (Given(experts=E, top_k=K, blocks=B, dense_blocks=(1,)), "block 1, token 0: expert"),
        (Given(experts=E, top_k=K, blocks=B, first_position=5), "4 prompt tokens, but positions"),
    ],
)
def test_what_does_not_fit_the_file_is_refused(given: Given, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", one(0))
    with pytest.raises(ImportRefused, match=says) as e:
        read(path, given)
    assert str(path) in str(e.value)


def test_a_dense_block_that_nobody_named_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", one(0))
    with pytest.raises(ImportRefused, match=r"layer 0: all ids are 0.*--dense-blocks"):
        import_trace(path, tmp_path / "run", given=Given(experts=E, top_k=K, blocks=B))


Damage = Callable[[dict[str, Any]], Any]


def meta(**values: Any) -> Damage:
    return lambda x: x["meta_info"].update(values)


def encoded(data: bytes) -> Damage:
    return meta(routed_experts=base64.b64encode(data).decode())


def without(key: str) -> Damage:
    return lambda x: x["meta_info"].pop(key)


def row_lost(x: dict[str, Any]) -> None:
    meta(routed_experts=response(drawn(0)[1:], 4, 3)["meta_info"]["routed_experts"])(x)


def garbled(x: dict[str, Any]) -> None:
    """Signs among the base64 that are none: a lax decoder leaves them out."""
    text = x["meta_info"]["routed_experts"]
    meta(routed_experts=f"{text[:8]}????{text[8:]}")(x)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (row_lost, r"line 2: 5 rows, but 6 tokens ran"),
        (without("routed_experts"), r"line 2 has no 'routed_experts': .*--enable-return"),
        (meta(routed_experts=[1, 2]), r"line 2: routed_experts is a list"),
        (meta(routed_experts="AAA"), r"line 2: routed_experts is no base64"),
        (garbled, r"line 2: routed_experts is no base64"),
        (meta(routed_experts="é" * 8), r"line 2: routed_experts is no base64"),
        (encoded(b"123"), r"line 2: routed_experts has 3 bytes"),
        (encoded(b"1234"), r"line 2: 1 ids are no whole rows of 3 blocks and top-2"),
        (encoded(b""), r"line 2: 0 rows, but 6"),
        (without("prompt_tokens"), r"line 2: prompt_tokens is None"),
        (meta(completion_tokens=-3), r"line 2: completion_tokens is -3"),
        (meta(completion_tokens=4), r"line 2: 6 rows, but 7 tokens ran \(4 \+ 4 - 1\)"),
        (meta(finish_reason=None), r"line 2 is a part of a streamed response"),
        (lambda x: x.update(meta_info=[]), r"line 2: meta_info is a list"),
        (lambda x: x.pop("meta_info"), r"line 2 has neither 'meta_info' nor 'choices'"),
        (lambda x: x.update(error={"message": "no"}), r"line 2 is an error"),
        (lambda x: x.update(prompt_token_ids=[1]), r"line 2: 1 prompt token ids, but 4"),
        (lambda x: x.update(prompt_token_ids="abcd"), r"line 2: the prompt token ids are no list"),
        (lambda x: x.update(prompt_token_ids=[-1] * 4), r"line 2: a prompt token id is out"),
        (meta(id="r"), r"line 2: request r for the second time: .* counted twice"),
    ],
)
def test_damaged_responses_are_refused(damage: Damage, says: str, tmp_path: Path) -> None:
    bad = one(1, "bad")
    damage(bad)
    path = write(tmp_path / "r.jsonl", one(0), bad, one(2, "last"))
    with pytest.raises(ImportRefused, match=says) as e:
        read(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def answer(**values: Any) -> dict[str, Any]:
    """An OpenAI answer, as `test_answers_of_the_openai_api_are_read` has it from SGLang."""
    found: dict[str, Any] = json.loads((DATA / "openai.jsonl").read_text().splitlines()[0])
    return found | values


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (answer(sglext=None), r"line 1 has no 'sglext': .*return_routed_experts"),
        (answer(sglext={}), r"line 1 has no 'routed_experts'"),
        (answer(usage=None), r"line 1 has no 'usage'"),
        (answer(choices=[{}, {}]), r"line 1 has 2 choices, but the routing of the first alone"),
        (answer(choices=[{"meta_info": {}}]), r"line 1, choice 0: prompt_tokens is None"),
        (answer(choices=7), r"line 1 has neither"),
        (
            answer(usage={"prompt_tokens": 4, "completion_tokens": 9}),
            r"line 1: 3 output token ids, but 9",
        ),
        (answer(object="error"), r"line 1 is an error"),
        (answer(sglext={"output_ids": 5}), r"line 1 has no 'routed_experts'"),
        ([[1]], r"line 1, response 0 is a list"),
        (7, r"line 1 is a int, not a response"),
    ],
)
def test_damaged_answers_are_refused(bad: Any, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", bad)
    with pytest.raises(ImportRefused, match=says):
        read(path)


def test_what_is_not_said_is_not_there(tmp_path: Path) -> None:
    nameless = [one(n) for n in range(2)]
    for x in nameless:
        x["meta_info"].pop("id")
    assert [x.request for x in read(write(tmp_path / "r.jsonl", *nameless))] == [None, None]
    usage = {"prompt_tokens": 4, "completion_tokens": 3, "prompt_tokens_details": "none"}
    found = read(write(tmp_path / "a.jsonl", answer(usage=usage)))
    assert [x.first_position for x in found] == [0]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="cannot be read: Is a directory"):
        read(tmp_path)
    path = tmp_path / "r.json"
    for text in ("[" * 100_000, "\n{\n" + "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ImportRefused, match="is no whole JSON"):
            read(path)


def test_torn_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", one(0), one(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ImportRefused, match=r"line 2 is no whole JSON"):
        read(path)
    path.write_bytes(whole[:30])
    with pytest.raises(ImportRefused, match=r"is no whole JSON .* torn"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(ImportRefused, match="holds no response with a token"):
        read(path)

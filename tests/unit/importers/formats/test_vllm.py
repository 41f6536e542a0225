"""vLLM's arrays and answers: to the token, in every layout, and ten damaged ones of each."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.engines.vllm_answers import OWN, Served, choices, numpy2base64

import moe_lens
from moe_lens.errors import ImportRefused
from moe_lens.importers.formats import format_of, vllm
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Given, Sequence

GIVEN = Given(experts=16, dense_blocks=(0,))
ONE = Served([5, 6, 7, 8], [[9, 10, 11]])


def read(path: Path, given: Given = GIVEN) -> list[Sequence]:
    source = vllm.open_source(path, given)
    (rank,) = source.ranks
    items = list(rank.items())
    assert all(isinstance(x, Sequence) for x in items)
    return [x for x in items if isinstance(x, Sequence)]


def write(path: Path, *said: object) -> Path:
    path.write_text("".join(f"{json.dumps(x)}\n" for x in said))
    return path


def same(sequence: Sequence, ids_TBK: NDArray[Any], first: int = 0) -> bool:
    return bool(np.array_equal(sequence.ids_TLK, ids_TBK[first:, 1:]))


# -- arrays ----------------------------------------------------------------------------------------


def test_array_is_one_request_by_its_name(tmp_path: Path) -> None:
    ids = choices(7)
    np.save(tmp_path / "req-12.npy", ids)
    source = vllm.open_source(tmp_path / "req-12.npy", GIVEN)
    (got,) = source.ranks[0].items()
    assert isinstance(got, Sequence)
    assert same(got, ids)
    assert (got.request, got.prompt_tokens, got.first_position) == ("req-12", None, 0)
    assert [(x.layer, x.block, x.experts, x.top_k) for x in source.layers] == [
        (0, 1, 16, 2),
        (1, 2, 16, 2),
        (2, 3, 16, 2),
    ]
    assert {"weights", "entropy", "steps", "times", "phases"} <= set(source.lacks)


def test_array_whose_first_position_is_given(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", choices(7))
    (got,) = read(tmp_path / "a.npy", Given(experts=16, dense_blocks=(0,), first_position=30))
    assert same(got, choices(7))
    assert got.first_position == 30


@pytest.mark.parametrize("kind", ["uint8", "uint16", ">u2", "int32", "int64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_integers_in_any_order(tmp_path: Path, kind: str, order: Any) -> None:
    ids = choices(7)
    np.save(tmp_path / "a.npy", np.asarray(ids, kind, order=order))
    assert same(read(tmp_path / "a.npy")[0], ids)


@settings(max_examples=30, deadline=None)
@drawn(
    T=st.integers(1, 9),
    B=st.integers(1, 5),
    K=st.integers(1, 4),
    E=st.sampled_from([4, 256, 257, 1024]),
    data=st.data(),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, T: int, B: int, K: int, E: int, data: Any
) -> None:
    dense = tuple(data.draw(st.sets(st.integers(0, B - 1), max_size=B - 1)))
    ids = choices(T, B=B, K=K, E=E, dense=dense)
    path = tmp_path_factory.mktemp("npy") / "a.npy"
    np.save(path, ids)
    (got,) = read(path, Given(experts=E, blocks=B, top_k=K, dense_blocks=dense))
    sparse = [b for b in range(B) if b not in dense]
    assert np.array_equal(got.ids_TLK, ids[:, sparse])


def test_folder_in_the_order_of_names_mapped_where_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"b": 30, "a": 3, "c": 300}
    for name, T in sizes.items():
        np.save(tmp_path / f"{name}.npy", choices(T))
    monkeypatch.setattr(vllm, "MAPPED", 1000)
    got = read(tmp_path)
    assert [x.request for x in got] == ["a", "b", "c"]
    assert all(same(x, choices(sizes[str(x.request)])) for x in got)
    assert isinstance(got[2].ids_TLK, np.memmap)
    assert not isinstance(got[0].ids_TLK, np.memmap)


def header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def npy(ids: NDArray[Any]) -> bytes:
    return base64.b64decode(numpy2base64(ids))


def changed(ids: NDArray[Any], at: tuple[int, ...], to: int) -> bytes:
    out = ids.copy()
    out[at] = to
    return npy(out)


DAMAGED_ARRAYS = {
    "torn": (npy(choices(7))[:-5], "r.npy: array is no whole .npy file"),
    "torn header": (npy(choices(7))[:40], "r.npy: array is no whole .npy file"),
    "a bracket too many": (header("((1, 4, 2)"), "r.npy: array is no whole .npy file"),
    "empty": (b"", "r.npy: array is no .npy"),
    "text": (b"not an array at all", "r.npy: array is no .npy"),
    "pickled": (header("(1,)", "'|O'") + b"cos\nsystem\n.", "Object arrays cannot be loaded"),
    "archive": (b"PK\x05\x06" + bytes(18), "r.npy: array is an .npz archive"),
    "floats": (npy(choices(7).astype(np.float32)), "r.npy: array: expert ids are float32"),
    "flat": (npy(choices(7).ravel()), "an array of (56,), not of [tokens, decoder blocks, top-k]"),
    "other axes": (npy(np.moveaxis(choices(7), 0, 1)), "7 rows a token, but the model has 4"),
    "no choice": (npy(choices(7)[:, :, :0]), "has no choice in it"),
    "in a dense block": (
        changed(choices(7), (4, 0, 1), 3),
        "r.npy: array, block 0, token 4: expert 3 in a block that was given as one without experts",
    ),
}


@pytest.mark.parametrize(("content", "says"), DAMAGED_ARRAYS.values(), ids=DAMAGED_ARRAYS)
def test_damaged_array_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "r.npy").write_bytes(content)
    refused(tmp_path / "r.npy", says, Given(experts=16, blocks=4, dense_blocks=(0,)))


def refused(path: Path, says: str, given: Given = GIVEN) -> None:
    with pytest.raises(ImportRefused) as e:
        read(path, given)
    assert says in str(e.value)
    assert str(e.value).startswith(str(path))
    assert "\n" not in str(e.value)


def test_what_the_arrays_hold_is_checked_on_the_way_in(tmp_path: Path) -> None:
    for name, content, says in [
        ("r", changed(choices(7), (3, 2, 0), 99), "expert 99 of 16"),
        ("s", npy(np.zeros_like(choices(7))), "all ids are 0"),
    ]:
        (tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(ImportRefused, match=says):
            import_trace(tmp_path / f"{name}.npy", tmp_path / "run", given=GIVEN)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Given(), "give --experts N, or --config"),
        (Given(experts=16, top_k=8), "2 choices a token, but top-8 was given"),
        (Given(experts=16, blocks=48), "4 rows a token, but the model has 48 decoder blocks"),
        (Given(experts=16, dense_blocks=(4,)), "there is no block 4 in 4 decoder blocks"),
        (Given(experts=16, dense_blocks=(-1, 2)), "there is no block -1 in 4 decoder blocks"),
        (Given(experts=16, dense_blocks=(0, 1, 2, 3)), "all 4 blocks are given as ones without"),
        (Given(experts=1), "2 choices a token of 1 experts"),
        (Given(experts=300, dense_blocks=(0,)), "ids are uint8, which has no room for 300"),
    ],
)
def test_what_is_given_must_fit(tmp_path: Path, given: Given, says: str) -> None:
    np.save(tmp_path / "r.npy", choices(7))
    refused(tmp_path / "r.npy", says, given)


def test_folders_that_say_nothing_or_twice(tmp_path: Path) -> None:
    refused(tmp_path, "holds no .npy, .json or .jsonl file")
    np.save(tmp_path / "a.npy", choices(7))
    write(tmp_path / "b.jsonl", ONE.chat())
    refused(tmp_path, "holds arrays (a.npy) and answers (b.jsonl)")


# -- answers ---------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[Callable[[Served], dict[str, Any]], bool]] = {
    "completion": (lambda x: x.completion(), False),
    "completion with token ids": (lambda x: x.completion(token_ids=True), True),
    "chat": (lambda x: x.chat(), False),
    "chat with token ids": (lambda x: x.chat(token_ids=True), True),
    "generate": (lambda x: x.generate(), True),
    "run-batch": (lambda x: x.batch_line(), False),
    "RequestOutput": (lambda x: x.request_output(), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "pretty", "list"])
def test_every_layout(tmp_path: Path, layout: str, suffix: str) -> None:
    make, has_token_ids = LAYOUTS[layout]
    path = tmp_path / f"a.{'jsonl' if suffix == 'jsonl' else 'json'}"
    said = make(ONE)
    path.write_text(
        json.dumps([said] if suffix == "list" else said, indent=1 if suffix == "pretty" else None)
    )
    assert format_of(path) == "vllm"
    (got,) = read(path)
    assert same(got, ONE.ids[0])
    assert (got.request, got.prompt_tokens, got.first_position) == ("cmpl-0", 4, 0)
    assert (got.token_id_T is not None) == has_token_ids
    if got.token_id_T is not None:
        assert got.token_id_T.tolist() == [5, 6, 7, 8, 9, 10]  # the last sampled one never ran


def test_own_responses_of_vllm(tmp_path: Path) -> None:
    """vLLM's code wrote these: what this module reads is what `numpy.load` says."""
    said = [json.loads(line) for line in OWN.read_text().splitlines()]
    built = Served([1] * 12, [[2] * 6]).completion()
    assert set(built) <= set(said[0])
    assert set(built["choices"][0]) <= set(said[0]["choices"][0])
    assert set(built["usage"]) <= set(said[0]["usage"])
    got = read(OWN)
    arrays = [
        np.load(io.BytesIO(base64.b64decode(c["routed_experts"])))
        for x in said
        for c in x["choices"]
    ]
    assert arrays[0].dtype == np.uint8
    assert not arrays[0][:, 0].any()  # the block without experts has a row
    assert [len(x.ids_TLK) for x in got] == [12 + 5, 50 + 5, 7 + 5, 90 + 5, 20 + 3, 20 + 3]
    for sequence, array in zip(got, arrays, strict=True):
        assert np.array_equal(sequence.ids_TLK, array[:, 1:])
    assert [x.prompt_tokens for x in got] == [12, 50, 7, 90, 20, 20]
    assert [x.request for x in got][3:] == ["cmpl-23", "cmpl-24/0", "cmpl-24/1"]


def test_several_choices_share_a_prompt(tmp_path: Path) -> None:
    two = Served([1, 2, 3], [[4, 5, 6], [7]])
    for said in (two.completion(), two.chat(), two.generate(), two.request_output()):
        got = read(write(tmp_path / "a.jsonl", said))
        assert [x.request for x in got] == ["cmpl-0/0", "cmpl-0/1"]
        assert [x.prompt_tokens for x in got] == [3, 3]
        assert all(same(x, ids) for x, ids in zip(got, two.ids, strict=True))
    two = Served([1, 2, 3], [[4, 5, 6], [7]], start=1)
    for said in (two.completion(), two.chat()):
        got = read(
            write(tmp_path / "a.jsonl", {"response": said, "routed_experts_prompt_start": 1})
        )
        assert [(x.first_position, x.prompt_tokens) for x in got] == [(1, 2), (1, 2)]


def test_cached_prefix_of_several_choices_is_nobodys(tmp_path: Path) -> None:
    """Each found another part of the prompt in the cache, and the answer has one number."""
    two = Served([1, 2, 3], [[4, 5, 6], [7]], cached=2)
    for said in (two.completion(), two.request_output()):
        got = read(write(tmp_path / "a.jsonl", said))
        assert all(same(x, ids) for x, ids in zip(got, two.ids, strict=True))


def test_several_prompts_of_one_completion(tmp_path: Path) -> None:
    """Usage counts their prompts together, so how long each is stays unknown without their ids."""
    said = Served([1, 2, 3], [[4, 5], [6]]).completion()
    said["choices"][1]["routed_experts"] = numpy2base64(choices(9))  # a prompt of 9
    said["usage"] |= {"prompt_tokens": 12}
    got = read(write(tmp_path / "a.jsonl", said))
    assert [(len(x.ids_TLK), x.prompt_tokens) for x in got] == [(4, None), (9, None)]


def test_cached_prefix_is_left_out_where_it_is_known(tmp_path: Path) -> None:
    cached = Served(list(range(10)), [[20, 21]], cached=8)
    for said in (cached.chat(), cached.request_output()):
        (got,) = read(write(tmp_path / "a.jsonl", said))
        assert same(got, cached.ids[0], first=8)
        assert (got.first_position, got.prompt_tokens, len(got.ids_TLK)) == (8, 2, 3)
    (got,) = read(write(tmp_path / "a.jsonl", cached.request_output()))
    assert got.token_id_T is not None
    assert got.token_id_T.tolist() == [8, 9, 20]


@pytest.mark.parametrize("kept", ["beside", "request", "given"])
def test_start_of_the_prompt_left_out_by_the_request(tmp_path: Path, kept: str) -> None:
    started = Served(list(range(10)), [[20, 21]], start=4, cached=2)
    said: dict[str, Any] = {"response": started.chat(token_ids=True), "tag": "agent"}
    if kept == "beside":
        said["routed_experts_prompt_start"] = 4
    elif kept == "request":
        said["request"] = {"messages": [], "routed_experts_prompt_start": 4}
    given = Given(experts=16, dense_blocks=(0,), first_position=4 if kept == "given" else None)
    (got,) = read(write(tmp_path / "a.jsonl", said), given)
    assert same(got, started.ids[0])
    assert (got.first_position, got.prompt_tokens, got.tag) == (4, 6, "agent")
    assert got.token_id_T is not None
    assert got.token_id_T.tolist() == [4, 5, 6, 7, 8, 9, 20]


def test_aborted_request_has_none(tmp_path: Path) -> None:
    aborted = ONE.chat()
    aborted["choices"][0] |= {"routed_experts": None, "finish_reason": "abort"}
    assert len(read(write(tmp_path / "a.jsonl", aborted, ONE.chat()))) == 1


def test_failed_requests_are_left_out_if_asked_and_counted(tmp_path: Path) -> None:
    failed = [
        {"id": "v", "custom_id": "a", "response": None, "error": "bad request"},
        {"custom_id": "b", "response": {"body": {"error": {"message": "too long"}}}, "error": None},
    ]
    path = write(tmp_path / "a.jsonl", *failed, ONE.batch_line())
    refused(path, "line 1: the request failed (bad request), so it has no routing")
    refused(path, "Leave such requests out with --allow-gaps")
    refused(write(tmp_path / "b.jsonl", ONE.batch_line(), failed[1]), "line 2: the request failed")
    gaps = Given(experts=16, dense_blocks=(0,), allow_gaps=True)
    assert len(read(path, gaps)) == 1
    assert list(vllm.open_source(path, gaps).notes.values()) == [2]


def edited(change: Any, said: dict[str, Any] | None = None) -> dict[str, Any]:
    made = said or ONE.chat(token_ids=True)
    change(made)
    return made


def _choice(**to: Any) -> Any:
    return lambda said: said["choices"][0].update(to)


def _file(data: bytes) -> dict[str, Any]:
    """An answer with this for an .npy file."""
    return edited(_choice(routed_experts=base64.b64encode(data).decode()))


SHORT = numpy2base64(choices(5))
TEXT = numpy2base64(choices(6))
DAMAGED = {
    "a row is missing": (
        edited(_choice(routed_experts=SHORT)),
        "line 2: 5 rows of routing, but 6 tokens ran (prompt 4 + generated 3 - 1)",
    ),
    "by usage alone": (
        edited(_choice(routed_experts=SHORT), ONE.completion()),
        "line 2: 5 rows of routing, but 6 tokens ran",
    ),
    "no routing": (
        edited(_choice(routed_experts=None)),
        "line 2: no routed_experts: was the server started with --enable-return-routed-experts",
    ),
    "no field": (
        edited(lambda said: said["choices"][0].pop("routed_experts")),
        "line 2: no answer of vLLM with routed_experts",
    ),
    "no base64": (edited(_choice(routed_experts=TEXT[:50] + "!")), "routed_experts is no base64"),
    "torn base64": (edited(_choice(routed_experts=TEXT[:-8])), "line 2: routed_experts is no .npy"),
    "bytes follow": (_file(npy(choices(6)) + b"xy"), "line 2: 2 bytes follow the array"),
    "a huge shape": (_file(header("(99999999999999, 4, 2)")), "routed_experts is no .npy file"),
    "a bracket too many": (_file(header("((1, 4, 2)")), "routed_experts is no .npy file"),
    "a number": (edited(_choice(routed_experts=5)), "line 2: routed_experts is the number 5"),
    "details that are none": (
        edited(_choice(routed_experts=SHORT)) | {"usage": {"prompt_tokens_details": 5}},
        "line 2: 5 rows of routing, but 6 tokens ran",
    ),
    "pickled": (
        _file(header("(1,)", "'|O'") + b"."),
        "line 2: routed_experts is no .npy file (Object arrays cannot be loaded",
    ),
    "floats": (
        edited(_choice(routed_experts=numpy2base64(choices(6) / 2))),
        "line 2: expert ids are float64, not integers",
    ),
    "another model": (
        edited(_choice(routed_experts=numpy2base64(choices(6, B=3)))),
        "line 2: an array of (6, 3, 2), not of [tokens, 4 decoder blocks, top-2]",
    ),
    "ragged": (
        edited(_choice(routed_experts=[[[1, 2]], [[3]]])),
        "line 2: routed_experts is no array",
    ),
    "in a dense block": (
        _file(changed(choices(6), (2, 0, 0), 7)),
        "line 2, block 0, token 2: expert 7",
    ),
    "no count": (
        edited(lambda said: said["usage"].update(prompt_tokens="4"), ONE.chat()),
        "line 2: prompt_tokens is '4', not a number of tokens",
    ),
    "counts that differ": (
        edited(lambda said: said["usage"].update(prompt_tokens=5)),
        "line 2: 4 token ids, but prompt_tokens is 5",
    ),
    "cached more than there is": (
        edited(lambda said: said["usage"].update(prompt_tokens_details={"cached_tokens": 5})),
        "line 2: 5 cached tokens of a prompt of 4",
    ),
    "token ids": (edited(_choice(token_ids=[1, "x", 2])), "token ids are no list of numbers"),
    "a token id": (edited(_choice(token_ids=[1, -3, 2])), "line 2: a token id is -3"),
    "choices": (edited(lambda said: said.update(choices=[1])), "line 2: no answer of vLLM"),
    "several that do not add up": (
        edited(
            lambda said: said["choices"][1].update(routed_experts=numpy2base64(choices(4))),
            Served([1, 2, 3], [[4, 5, 6], [7]]).completion(),
        ),
        "line 2: 9 rows in 2 choices do not add up to prompts of 3 and 4 generated tokens",
    ),
    "several whose prompts do not": (
        Served([1] * 5, [[4]] * 3, ids=[choices(3), choices(3), choices(4)]).completion(),
        "line 2: 10 rows in 3 choices do not add up to prompts of 5 and 3 generated tokens",
    ),
    "one of several shorter than the prompt": (
        Served([1] * 5, [[4, 4], [4, 4]], ids=[choices(4), choices(8)]).chat(),
        "line 2, choice 0: 4 rows of routing for a prompt of 5 tokens",
    ),
    "twice": (Served([1], [[2, 3]], name="cmpl-first").chat(), "request cmpl-first for the second"),
    "start after the prompt": (
        {"response": ONE.chat(token_ids=True), "routed_experts_prompt_start": 5},
        "line 2: 4 prompt tokens, but they begin at 5",
    ),
    "no object": ([1, 2], "line 2: no answer of vLLM"),
}


@pytest.mark.parametrize(("said", "says"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_answer_is_refused(tmp_path: Path, said: Any, says: str) -> None:
    first = Served([1], [[2, 3]], name="cmpl-first").chat()
    refused(write(tmp_path / "a.jsonl", first, said), says)


def test_torn_tail_and_no_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ONE.chat(), ONE.chat())
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, "line 2 is no JSON")
    refused(path, "the file ends in the middle of it")
    path.write_bytes(b'{"a": ' + b"[" * 100_000)
    refused(path, "line 1 is no JSON")
    (tmp_path / "b.json").write_bytes(b'{\n"choices": [\xff')
    refused(tmp_path / "b.json", "b.json is no JSON")
    (tmp_path / "c.jsonl").write_bytes(b"")
    refused(tmp_path / "c.jsonl", "holds no answer with routing")


def test_files_of_a_folder_are_named_in_errors(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ONE.chat())
    write(tmp_path / "b.jsonl", ONE.chat())
    refused(tmp_path, "b.jsonl, line 1: request cmpl-0 for the second time")


def test_recognises_nothing_else(tmp_path: Path) -> None:
    for name, said in (
        ("sglang.json", {"text": "…", "meta_info": {"id": "1", "routed_experts": "AAAA"}}),
        ("openai.json", {"object": "chat.completion", "choices": [{"message": {}}]}),
        ("ours.json", {"run_id": "x", "layers": []}),
        ("trace.jsonl", {"step": 0, "layer": 1, "experts": [1, 2]}),
    ):
        path = write(tmp_path / name, said)
        assert not vllm.recognises(path, path.read_bytes())
    (tmp_path / "a.txt").write_text("routed_experts")
    assert not vllm.recognises(tmp_path / "a.txt", b"routed_experts")
    (tmp_path / "a.json").write_bytes(b'{"choices": ' + b"[" * 100_000)
    assert not vllm.recognises(tmp_path / "a.json", b"{")
    assert not vllm.recognises(tmp_path / "gone.json", b"{")
    assert not vllm.recognises(tmp_path, b"") or format_of(tmp_path)


def test_whole_import_counts_as_a_plain_loop_does(tmp_path: Path) -> None:
    many = [
        Served(list(range(3 + i)), [[7] * (1 + i % 5)], name=f"r{i}", cached=i % 3)
        for i in range(20)
    ]
    said = [{"response": x.chat(), "tag": f"t{i % 2}"} for i, x in enumerate(many)]
    path = write(tmp_path / "a.jsonl", *said)
    done = import_trace(path, tmp_path / "run", given=GIVEN)
    want: Counter[tuple[int, str, int]] = Counter()
    tokens = sum(len(x.ids[0]) - (x.cached or 0) for x in many)
    for i, x in enumerate(many):
        for row in x.ids[0].tolist()[i % 3 :]:
            for block in (1, 2, 3):
                for e in row[block]:
                    want[block - 1, f"t{i % 2}", e] += 1
    assert (done.format, done.tokens, done.sequences) == ("vllm", tokens, 20)
    with moe_lens.open(tmp_path / "run") as trace:
        rows = trace.sql("select layer, tag, expert, sum(routed) n from load group by all").df()
        phases = trace.sql("select phase, sum(tokens) n from steps group by all").df()
    assert {(r.layer, r.tag, r.expert): r.n for r in rows.itertuples()} == want
    prompts = sum(len(x.prompt) - (x.cached or 0) for x in many)
    by_phase = {"prefill": prompts, "decode": tokens - prompts}
    assert dict(zip(phases.phase, phases.n, strict=True)) == by_phase

"""Megatron-Core's router trace: what its own tracer wrote, and what nobody should believe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.engines.megatron_trace import Fired, write_rank

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats import megatron
from moe_lens.importers.source import Given, Pass, Source

DATA = Path(__file__).parents[3] / "data/engines/megatron"
"""Written by megatron-core 0.19.0's own tracer: tests/support/engines/make_megatron.py."""

TRACE = "router_trace_rank0.jsonl"
PEERS = DATA / "ranks"
RECOMPUTED = DATA / "recomputed"
T, K, E = 6, 2, 8


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, plainly."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def bfloat16(path: Path, record: dict[str, Any]) -> NDArray[np.float32]:
    """A record's logits: two bytes each, the upper half of a float32."""
    data = path.read_bytes()[record["logit_offset"] :][: record["logit_bytes"]]
    whole = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    return np.frombuffer(whole, "<f4").reshape(record["logit_shape"])


def passes(source: Source, rank: int = 0) -> list[Pass]:
    out = list(source.ranks[rank].items())
    assert all(isinstance(x, Pass) for x in out)
    return out  # type: ignore[return-value]


def drawn(seed: int, tokens: int = 4) -> NDArray[np.int64]:
    return np.argsort(np.random.default_rng(seed).random((tokens, E)), axis=1)[:, :K]


def fired(steps: int = 2, micro: int = 2, layers: int = 2, seed: int = 0) -> list[Fired]:
    """Passes of routers 0, 1, …, each with choices of its own."""
    return [
        Fired(step, layer, drawn(1000 * seed + 100 * step + 10 * m + layer))
        for step in range(steps)
        for m in range(micro)
        for layer in range(layers)
    ]


# -- what the tracer's own code wrote --------------------------------------------------------------


def test_the_tracers_own_file() -> None:
    source = megatron.open_source(PEERS, Given(pipeline_stages=1))
    assert [x.path for x in source.layers] == [
        "decoder.layers.1",
        "decoder.layers.3",
        "mtp.layers.0.mtp_model_layer.layers.1",
    ]
    assert [(x.role, x.block) for x in source.layers] == [("mlp", 1), ("mlp", 3), ("mtp", None)]
    # Experts from the logits, the score function and the hidden size from router_state_rank0.pt.
    assert {(x.experts, x.top_k, x.score, x.hidden_size) for x in source.layers} == {
        (E, K, "softmax", 4)
    }
    for rank in (0, 1):
        said = records(PEERS / f"router_trace_rank{rank}.jsonl")
        got = passes(source, rank)
        assert [(x.step, x.forward) for x in got] == [(7, 0), (7, 1), (8, 0), (8, 1)]
        for i, record in enumerate(said):
            choices = got[i // 3].choices[i % 3]
            assert choices.ids_TK.tolist() == record["top_indices"]
            assert choices.logits_TE is not None
            logits_TE = bfloat16(PEERS / f"logits_rank{rank}.bin", record)
            np.testing.assert_array_equal(choices.logits_TE, logits_TE)
            # An independent truth: the router of make_megatron takes the largest logits.
            largest = np.sort(np.argsort(-logits_TE, axis=1, kind="stable")[:, :K], axis=1)
            np.testing.assert_array_equal(choices.ids_TK, largest)


def test_counts_equal_a_loop_over_the_file() -> None:
    counts = np.zeros((3, E), int)
    for x in passes(megatron.open_source(PEERS, Given(pipeline_stages=1))):
        for layer, choices in x.choices.items():
            counts[layer] += np.bincount(choices.ids_TK.ravel(), minlength=E)
    looped = np.zeros((3, E), int)
    order = {("decoder", 1): 0, ("decoder", 3): 1, ("mtp", 1): 2}
    for record in records(PEERS / "router_trace_rank0.jsonl"):
        for token in record["top_indices"]:
            for expert in token:
                looped[order[record["block"], record["layer"]], expert] += 1
    np.testing.assert_array_equal(counts, looped)


def test_the_builder_writes_what_the_tracer_wrote(tmp_path: Path) -> None:
    for rank in (0, 1):
        sidecar = PEERS / f"logits_rank{rank}.bin"
        again = [
            Fired(
                x["step"],
                x["layer"],
                np.array(x["top_indices"]),
                bfloat16(sidecar, x),
                x["block"],
                x.get("mtp_idx"),
            )
            for x in records(PEERS / f"router_trace_rank{rank}.jsonl")
        ]
        path = write_rank(tmp_path, again, rank=rank)
        assert path.read_bytes() == (PEERS / path.name).read_bytes()
        assert (tmp_path / sidecar.name).read_bytes() == sidecar.read_bytes()


def test_recomputation_in_backward_is_no_second_forward() -> None:
    plain = megatron.open_source(PEERS / "router_trace_rank0.jsonl", Given())
    again = megatron.open_source(RECOMPUTED, Given())
    assert len(records(RECOMPUTED / "router_trace_rank0.jsonl")) == 24  # twice 2 x 2 x 3
    assert sum(again.notes.values()) == 12
    assert not plain.notes
    for a, b in zip(passes(plain), passes(again), strict=True):
        assert (a.step, a.forward) == (b.step, b.forward)
        for layer in range(3):
            np.testing.assert_array_equal(a.choices[layer].ids_TK, b.choices[layer].ids_TK)
            np.testing.assert_array_equal(a.choices[layer].logits_TE, b.choices[layer].logits_TE)


def test_each_forward_is_computed_again_once(tmp_path: Path) -> None:
    """The same batch twice, each with its recomputation: two forwards, not one."""
    write_rank(tmp_path, fired(steps=1, micro=1, layers=1) * 4)
    source = megatron.open_source(tmp_path, Given(experts=E))
    assert [x.forward for x in passes(source)] == [0, 1]


# -- variants that are right -----------------------------------------------------------------------


def test_it_is_recognised(tmp_path: Path) -> None:
    assert megatron.recognises(PEERS, b"")
    file = PEERS / "router_trace_rank1.jsonl"
    assert megatron.recognises(file, file.read_bytes()[:4096])
    assert not megatron.recognises(tmp_path, b"")
    assert not megatron.recognises(tmp_path / "x.jsonl", b'{"prompt_id": 0, "layer_idx": 1}')


def test_rows_are_positions_times_sequences() -> None:
    source = megatron.open_source(PEERS / "router_trace_rank0.jsonl", Given(sequence_length=3))
    assert "sequences" not in source.lacks
    tokens = [x.tokens for x in passes(source)]
    assert [x.sequence_T.tolist() for x in tokens if x] == [
        [first, first + 1] * 3 for first in (0, 2, 4, 6)
    ]
    assert all(x is not None and x.position_T.tolist() == [0, 0, 1, 1, 2, 2] for x in tokens)
    source = megatron.open_source(PEERS, Given(pipeline_stages=1))
    assert all(x.tokens is None for x in passes(source))
    assert "sequences" in source.lacks


def test_inference_has_a_step_for_each_forward_and_no_logits(tmp_path: Path) -> None:
    said = fired(steps=5, micro=1)
    for x, tokens in zip(said, [9, 9, 1, 1, 2, 2, 0, 0, 3, 3], strict=True):
        x.ids_TK = drawn(x.step * 2 + x.layer, tokens)
    write_rank(tmp_path, said)
    source = megatron.open_source(tmp_path, Given(experts=E, score="sigmoid", top_k=K))
    assert {(x.experts, x.score) for x in source.layers} == {(E, "sigmoid")}
    assert "entropy" in source.lacks
    got = passes(source)
    assert [len(x.choices[1].ids_TK) for x in got] == [9, 1, 2, 0, 3]
    assert got[3].choices[0].ids_TK.shape == (0, K)
    for x in said:
        np.testing.assert_array_equal(got[x.step].choices[x.layer].ids_TK, x.ids_TK)


def test_ranks_that_recorded_the_same_are_copies(tmp_path: Path) -> None:
    for rank, seed in enumerate((0, 0, 1)):
        write_rank(tmp_path, fired(seed=seed), rank=rank)
    source = megatron.open_source(tmp_path, Given(experts=E, pipeline_stages=1))
    assert [x.copy for x in source.ranks] == [False, True, False]
    (tmp_path / "router_trace_rank2.jsonl").unlink()
    source = megatron.open_source(tmp_path, Given(experts=E))  # no stages to ask for
    assert [x.copy for x in source.ranks] == [False, True]


def test_pipeline_stages_have_layers_of_their_own(tmp_path: Path) -> None:
    for rank in range(4):
        write_rank(tmp_path, fired(seed=rank, layers=3 if rank < 2 else 2), rank=rank)
    with pytest.raises(ImportRefused, match="--pipeline-stages"):
        megatron.open_source(tmp_path, Given(experts=E))
    source = megatron.open_source(tmp_path, Given(experts=E, pipeline_stages=2))
    assert [x.path for x in source.layers] == [
        *(f"stage0.decoder.layers.{i}" for i in range(3)),
        *(f"stage1.decoder.layers.{i}" for i in range(2)),
    ]
    assert {x.block for x in source.layers} == {None}  # of the model: not known
    assert [sorted(passes(source, rank)[0].choices) for rank in range(4)] == [
        [0, 1, 2],
        [0, 1, 2],
        [3, 4],
        [3, 4],
    ]
    with pytest.raises(ImportRefused, match=r"rank2.*decoder layer 2.*ranks 0 and 2"):
        megatron.open_source(tmp_path, Given(experts=E, pipeline_stages=1))
    with pytest.raises(ImportRefused, match="are not of 3 pipeline stages"):
        megatron.open_source(tmp_path, Given(experts=E, pipeline_stages=3))


def test_what_is_before_a_torn_tail_can_be_taken(tmp_path: Path) -> None:
    path = write_rank(tmp_path, fired(steps=3))
    path.write_bytes(path.read_bytes()[:-30])
    source = megatron.open_source(tmp_path, Given(experts=E, allow_gaps=True))
    assert [x.step for x in passes(source)] == [0, 0, 1, 1]
    assert len(source.notes) == 2  # the line, and the step that it was of


def test_logits_behind_the_last_record_are_left_alone(tmp_path: Path) -> None:
    """A killed recorder had written a part of the next ones."""
    folder = tmp_path / "trace"
    shutil.copytree(PEERS, folder)
    with (folder / "logits_rank0.bin").open("ab") as f:
        f.write(b"\1\2\3")
    whole = passes(megatron.open_source(PEERS / TRACE, Given()))[-1].choices[2].logits_TE
    got = passes(megatron.open_source(folder / TRACE, Given()))[-1].choices[2].logits_TE
    np.testing.assert_array_equal(got, whole)


def test_passes_that_the_tracer_skipped_can_be_left_out(tmp_path: Path) -> None:
    said = fired(steps=4)
    del said[4 + 1]  # a layer of step 1: tokens were dropped
    write_rank(tmp_path, [x for x in said if x.step != 2])
    source = megatron.open_source(tmp_path, Given(experts=E, allow_gaps=True))
    assert [(x.step, x.forward) for x in passes(source)] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    assert sorted(source.notes.values()) == [1, 1]


def test_a_file_without_its_last_newline_is_whole(tmp_path: Path) -> None:
    path = write_rank(tmp_path, fired())
    path.write_text(path.read_text().rstrip("\n"))
    assert len(passes(megatron.open_source(tmp_path, Given(experts=E)))) == 4


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_forwards_are_found_again(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Whatever was recorded: micro-batches, validation among them, layers recomputed or not."""
    steps, layers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    first = data.draw(st.integers(0, 5))
    recomputed = data.draw(st.sets(st.integers(0, layers - 1)))
    ran: list[Fired] = []
    truth: list[tuple[int, int, list[NDArray[Any]]]] = []
    for step in range(first, first + steps):
        for forward in range(data.draw(st.integers(1, 3))):
            trained = data.draw(st.booleans())
            seed = 1000 * step + 100 * forward
            ids = [drawn(seed + layer, 3 + forward) for layer in range(layers)]
            truth.append((step, forward, ids))
            ran += [Fired(step, layer, x) for layer, x in enumerate(ids)]
            ran += [Fired(step, x, ids[x]) for x in sorted(recomputed, reverse=True) if trained]
    path = write_rank(tmp_path_factory.mktemp("drawn"), ran)
    got = passes(megatron.open_source(path, Given(experts=E)))
    assert [(x.step, x.forward) for x in got] == [x[:2] for x in truth]
    for x, (_, _, ids) in zip(got, truth, strict=True):
        assert [x.choices[layer].ids_TK.tolist() for layer in range(layers)] == [
            y.tolist() for y in ids
        ]


# -- files that are damaged ------------------------------------------------------------------------


def _line(number: int, change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "router_trace_rank0.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        lines[number - 1] = change(lines[number - 1])
        path.write_text("".join(lines))

    return damage


def _said(number: int, **values: Any) -> Callable[[Path], None]:
    return _line(number, lambda x: json.dumps(json.loads(x) | values) + "\n")


def _rows(number: int, row: int, value: Any) -> Callable[[Path], None]:
    def change(line: str) -> str:
        record = json.loads(line)
        record["top_indices"][row] = value
        return json.dumps(record) + "\n"

    return _line(number, change)


def _cut(name: str, keep: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:keep])

    return damage


def _stop(rank: int, after: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / f"router_trace_rank{rank}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:after]))

    return damage


def _move(name: str, to: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder / to)

    return damage


def _later_step(folder: Path) -> None:
    for number in range(7, 13):
        _said(number, step=9)(folder)


def _far_away(folder: Path) -> None:
    text = (folder / "router_trace_rank1.jsonl").read_text()
    text = text.replace('"rank": 1', '"rank": 99999999999')
    (folder / "router_trace_rank99999999999.jsonl").write_text(text)
    shutil.copy(folder / "logits_rank1.bin", folder / "logits_rank99999999999.bin")


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "torn": (_cut(TRACE, 2800), rf"{TRACE}: line 12 breaks off .*--allow-gaps"),
    "cut at a line": (_line(12, lambda _: ""), r"step 8: 1 records of mtp 0 layer 1, but 2 of dec"),
    "garbage": (_line(4, lambda _: "\0\0\0\n"), "line 4: there is no top_indices"),
    "half a line": (_line(4, lambda x: x[9:]), "line 4: it is no JSON record up to top_indices"),
    "no step": (_line(2, lambda x: x.replace('"step"', '"stop"')), "line 2: step is None"),
    "layer": (_said(2, layer=-1), "line 2: layer is -1, not a number"),
    "another rank": (_said(5, rank=3), "line 5: rank is 3, but must be 0"),
    "another top-k": (_said(5, topk=3), "line 5: topk is 3, but must be 2"),
    "a step back": (_said(7, step=6), "line 7: step 6 after step 7"),
    "a missing step": (_later_step, "step 8 is missing: .*--allow-gaps"),
    "layers in another order": (
        _said(1, layer=3),
        "step 7: 1 records of decoder layer 1, but 3 of",
    ),
    "fewer rows": (_said(3, top_indices=[[0, 1]]), "line 3: top_indices has 1 rows, .* is 6"),
    "no list": (_said(3, top_indices=None), "line 3: top_indices has None, but num_tokens is 6"),
    "ragged": (_rows(3, 4, [1, 2, 3]), "line 3: row 4 has 3 ids, but topk is 2"),
    "nested": (_rows(3, 4, [[1], [2]]), "line 3: row 4 has 2 ids, but topk is 2"),
    "no id": (_rows(3, 2, [1, 2.5]), "line 3: row 2 has 2.5, which is no expert id"),
    "text for an id": (_rows(3, 2, [1, "a"]), "line 3: row 2 has 'a', which is no expert id"),
    "logits of other tokens": (_said(2, logit_shape=[5, 8]), r"line 2: logit_shape is \[5, 8\]"),
    "logits' bytes": (_said(2, logit_bytes=95), "line 2: logit_bytes is 95, .* 96 bytes"),
    "logits elsewhere": (_said(2, logit_offset=90), "line 2: logit_offset is 90, but .* be 96"),
    "a short sidecar": (_cut("logits_rank0.bin", 900), "bin has 900 bytes, .* speaks of 1,152"),
    "no sidecar": (_move("logits_rank0.bin", "x"), "logits_rank0.bin cannot be read"),
    "no weights": (
        _cut("router_state_rank0.pt", 500),
        "router_state_rank0.pt is torn or was not written",
    ),
    "a renamed file": (
        _move("router_trace_rank1.jsonl", "router_trace_rank2.jsonl"),
        "rank2.jsonl says rank 1 in its records",
    ),
    "an empty rank": (_cut("router_trace_rank1.jsonl", 0), "router_trace_rank1.jsonl is empty"),
    "a missing rank": (_move(TRACE, "x"), f"there is no {TRACE}: .*--allow-gaps"),
    "a rank far away": (_far_away, r"there is no router_trace_rank2.jsonl: .*--allow-gaps"),
    "deep": (
        _line(2, lambda x: x.replace('"step": ', '"step": ' + "[" * 100_000)),
        "line 2: it is no JSON record up to top_indices",
    ),
    "deep choices": (
        _line(2, lambda x: x.replace('"top_indices": ', '"top_indices": ' + "[" * 100_000)),
        "line 2: top_indices is no JSON list",
    ),
    "a rank that stopped": (_stop(1, after=6), "has steps 7 to 7, but rank 0"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_with_the_place(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    folder = tmp_path / "trace"
    shutil.copytree(PEERS, folder)
    damage(folder)
    with pytest.raises(ImportRefused, match=message) as e:
        source = megatron.open_source(folder, Given(pipeline_stages=1))
        for rank in source.ranks:
            list(rank.items())
    assert "\n" not in str(e.value)
    assert str(folder) in str(e.value)


def test_a_recomputation_that_chooses_otherwise_is_refused(tmp_path: Path) -> None:
    said = fired(steps=1, micro=1, layers=3)
    again = [Fired(0, x.layer, drawn(77 + x.layer)) for x in reversed(said)]
    write_rank(tmp_path, said + again)
    with pytest.raises(ImportRefused, match="line 5: decoder layer 1 of step 0 before decoder lay"):
        megatron.open_source(tmp_path, Given(experts=E))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score_function": "tanh"}, "score function 'tanh' is not known here"),
        ({"weight": 3}, "is no router_state of Megatron's tracer .AttributeError"),
    ],
)
def test_states_of_other_routers_are_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    import torch

    write_rank(tmp_path, fired())
    router = {"weight": torch.zeros(E, 4), "expert_bias": torch.zeros(E), "score_function": None}
    path = tmp_path / "router_state_rank0.pt"
    torch.save({0: router, 1: router}, path)  # keys of the first versions
    source = megatron.open_source(tmp_path, Given())
    assert {(x.experts, x.selection_bias, x.score) for x in source.layers} == {(E, True, None)}
    torch.save({0: router | values}, path)
    with pytest.raises(ImportRefused, match=message):
        megatron.open_source(tmp_path, Given())
    torch.save({0: router, 1: router | {"weight": torch.zeros(9, 4)}}, path)
    with pytest.raises(ImportRefused, match="2 kinds of routers"):
        megatron.open_source(tmp_path, Given())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Given(), "give --experts N or --config"),
        (Given(experts=E, top_k=4), "topk is 2, but --top-k says 4"),
    ],
)
def test_facts_that_are_missing_or_contradict(said: Given, message: str, tmp_path: Path) -> None:
    write_rank(tmp_path, fired())
    with pytest.raises(ImportRefused, match=message):
        megatron.open_source(tmp_path, said)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            Given(experts=16),
            "number of experts of the logits of rank 0 is 8, but --experts says 16",
        ),
        (Given(score="sigmoid"), "score function is softmax, but --score says sigmoid"),
        (Given(sequence_length=4), "line 1: 6 tokens are no whole number of sequences of 4"),
    ],
)
def test_facts_that_contradict_the_sidecars(said: Given, message: str) -> None:
    with pytest.raises(ImportRefused, match=message):
        passes(megatron.open_source(PEERS / TRACE, said))

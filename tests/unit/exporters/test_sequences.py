"""Routing of whole sequences: to the token, in position's order, and named where it is not whole.

The traces are written row by row, with nothing of the package's writer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.side_by_side import E, K, Made

from moe_lens.errors import ExportRefused
from moe_lens.exporters import sequences
from moe_lens.exporters.exporting import SINGLE, export_trace
from moe_lens.exporters.selection import Selection
from moe_lens.importers.formats import sglang_responses, vllm
from moe_lens.importers.source import Given, Sequence
from moe_lens.trace.meta import Attempt


def arrays(out: Path) -> dict[int, NDArray[Any]]:
    index = json.loads((out / "index.json").read_text())
    return {x["sequence"]: np.load(out / x["file"]) for x in index["sequences"]}


def test_every_sequence_to_the_token(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw().write()
    done = export_trace(made.run, tmp_path / "out", "npy")
    got = arrays(tmp_path / "out")
    assert got.keys() == made.truth.keys()
    for number, ids_TLK in made.truth.items():
        assert got[number].dtype == np.uint8
        assert got[number].tolist() == ids_TLK.tolist()
    assert (done.sequences, done.tokens, done.left_out) == (3, 20, {})
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [(x["request"], x["tag"], x["tokens"], x["prompt_tokens"]) for x in index["sequences"]]\
        == [("r/0", "code", 7, 4), ("r/1", "math", 5, 2), ("r/2", "code", 8, 5)]  # fmt: skip
    assert [(x["layer"], x["block"], x["experts"]) for x in index["layers"]] == [
        (0, 1, 8), (1, 2, 8), (2, 4, 8),
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]  # no scratch is left


@pytest.mark.parametrize(("experts", "dtype"), [(256, "uint8"), (257, "uint16"), (65537, "int32")])
def test_ids_are_as_narrow_as_they_can_be(tmp_path: Path, experts: int, dtype: str) -> None:
    made = Made(tmp_path / "run", experts=experts).draw((1,), 1)
    made.truth[0][0, 0] = [experts - 1, 0]
    made.routing(0, 0, 0)["expert_ids"] = [experts - 1, 0]
    made.write()
    export_trace(made.run, tmp_path / "out", "npy")
    got = arrays(tmp_path / "out")[0]
    assert got.dtype.name == dtype
    assert got.tolist() == made.truth[0].tolist()


def test_without_the_last_position(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw((3, 1), 0).write()
    done = export_trace(made.run, tmp_path / "out", "npy", without_last=True)
    assert {n: x.tolist() for n, x in arrays(tmp_path / "out").items()} == {
        0: made.truth[0][:-1].tolist()
    }
    assert (done.sequences, done.tokens) == (1, 2)
    assert done.left_out == {SINGLE: ["r/1"]}  # of one token nothing is left
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["left_out"] == done.left_out
    assert [x["prompt_tokens"] for x in index["sequences"]] == [2]


def test_selected_by_tag_phase_and_steps(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw().write()
    export_trace(made.run, tmp_path / "a", "npy", selection=Selection(tag="math"))
    assert arrays(tmp_path / "a").keys() == {1}
    export_trace(made.run, tmp_path / "b", "npy", selection=Selection(phase="prefill"))
    assert {n: len(x) for n, x in arrays(tmp_path / "b").items()} == {0: 4, 1: 2, 2: 5}
    export_trace(made.run, tmp_path / "c", "npy", selection=Selection(steps=range(2)))
    assert {n: len(x) for n, x in arrays(tmp_path / "c").items()} == {0: 5, 1: 3, 2: 6}
    export_trace(made.run, tmp_path / "d", "npy", selection=Selection(layers=frozenset({0, 2})))
    assert arrays(tmp_path / "d")[1].tolist() == made.truth[1][:, [0, 2]].tolist()
    with pytest.raises(
        ExportRefused, match=r"whole sequence of phase 'decode'; .*: 3 do not begin"
    ):
        export_trace(made.run, tmp_path / "e", "npy", selection=Selection(phase="decode"))
    assert not (tmp_path / "e").exists()


def test_layers_of_another_stream_have_its_tokens(tmp_path: Path) -> None:
    """An encoder numbers its tokens apart: the same numbers are other tokens of the decoder."""
    made = Made(tmp_path / "run").draw((4, 2), 0)
    infos = made.infos()
    infos[2].stream = "encoder"
    made.changes = {"layers": infos}
    for r in [dict(r) for r in made.rows["tokens"]]:
        r |= {"stream": "encoder", "token": 5 - r["token"]}  # in another order
        made.rows["tokens"].append(r)
    for r in made.rows["routing"]:
        r["token"] = 5 - r["token"] if r["layer"] == 2 else r["token"]
    made.write()
    for layers, taken in ((None, [0, 1]), (frozenset({2}), [2])):
        out = tmp_path / str(taken)
        export_trace(made.run, out, "npy", selection=Selection(layers=layers))
        got = arrays(out)
        assert {n: x.tolist() for n, x in got.items()} == {
            n: x[:, taken].tolist() for n, x in made.truth.items()
        }
    both = Selection(layers=frozenset({0, 2}))
    with pytest.raises(ExportRefused, match=r"several streams \(encoder, main\)"):
        export_trace(made.run, tmp_path / "out", "npy", selection=both)


def test_rejected_drafts_are_no_part_of_it(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw()
    real = {n: x.copy() for n, x in made.truth.items()}
    # Step 9 routes position 5 of sequence 0 first as a draft, which is rejected; and one beyond.
    made.truth[0] = np.concatenate([real[0], real[0][:1]])[:, :, ::-1]
    made.forward(9, [(0, 5), (0, 7)], "decode")
    draft = {"step": 9, "forward": 3, "sequence": 0, "kept": False}
    made.rows["outcomes"] = [
        {**draft, "position": 5},
        {**draft, "position": 7},
        {**draft, "step": 2, "sequence": 1, "position": 3, "kept": True},
        {**draft, "step": 2, "sequence": 1, "position": 3, "kept": None, "loss": 1.0},
        {**draft, "step": 0, "sequence": 2, "position": None},  # a superseded beam
    ]
    made.write()
    export_trace(made.run, tmp_path / "out", "npy")
    got = arrays(tmp_path / "out")
    assert {n: x.tolist() for n, x in got.items()} == {n: real[n].tolist() for n in (0, 1)}


def test_what_is_not_whole_is_left_out_by_name(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw((4,) * 7, 3)
    tokens, routing = made.rows["tokens"], made.rows["routing"]
    for r in tokens:  # a prefix out of a cache
        if r["sequence"] == 0:
            r["position"] += 2
    tokens.remove(made.token(1, 2))
    made.rows["steps"].append({"step": 9, "forward": 0, "phase": "decode", "tokens": 1})
    tokens.append({**made.token(2, 3), "step": 9, "forward": 0, "token": 0})
    made.routing(3, 5, 1)["dropped"] = [1]
    routing.remove(made.routing(4, 0, 2))
    tokens.append({**made.token(5, 0), "token": 500, "position": 99, "padding": True})
    made.write()
    done = export_trace(made.run, tmp_path / "out", "npy")
    got = arrays(tmp_path / "out")
    assert {n: x.tolist() for n, x in got.items()} == {n: made.truth[n].tolist() for n in (5, 6)}
    assert done.left_out == {
        sequences.NOT_FROM_0: ["r/0"],
        sequences.HOLES: ["r/1"],
        sequences.TWICE: ["r/2"],
        sequences.DROPPED: ["r/3"],
        sequences.LAYERS: ["r/4"],
    }
    assert json.loads((tmp_path / "out/index.json").read_text())["left_out"] == done.left_out


def test_ranks_number_their_own_sequences(tmp_path: Path) -> None:
    one = Made(tmp_path / "run", changes={"world": 2}).draw(seed=1).write()
    two = Made(tmp_path / "run", rank=1, changes={"world": 2}).draw((3,), 2, seed=2).write()
    done = export_trace(one.run, tmp_path / "out", "npy")
    assert done.sequences == 4
    index = json.loads((tmp_path / "out/index.json").read_text())
    for x in index["sequences"]:
        truth = (one, two)[x["rank"]].truth[x["sequence"]]
        assert np.load(tmp_path / "out" / x["file"]).tolist() == truth.tolist()


def test_an_attempt_that_was_overtaken_counts_nowhere(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw((4,), 3)
    old = [dict(r) for r in made.rows["routing"] if r["step"] >= 2]
    for r in old:
        r["expert_ids"] = r["expert_ids"][::-1]
    for name, rows in made.rows.items():
        again = old if name == "routing" else [r for r in rows if r.get("step", 0) >= 2]
        made.rows[name] = [
            *({**r, "attempt": 1 if r.get("step", 0) >= 2 else 0} for r in rows),
            *({**r, "attempt": 0} for r in again),
        ]
    attempts = [Attempt(0, 1, first_step=0), Attempt(1, 2, first_step=2, ended_ns=3, end="closed")]
    made.changes = {"attempts": attempts}
    made.write()
    export_trace(made.run, tmp_path / "out", "npy")
    assert arrays(tmp_path / "out")[0].tolist() == made.truth[0].tolist()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lost", r"12 rows of tokens were lost .* Choose steps without, with --steps\."),
        ("dynamic", r"layers have a dynamic number of choices a token"),
        ("two k", r"layers have \[1, 2\] of choices a token"),
        ("stages", r"rank 1 has no layer 2 \(pipeline stages\?\)"),
        ("k lies", r"a token of layer 1 has 3 choices, but the layer is one of top-2\."),
        ("no tokens", r"has no whole sequence; its phases are decode, prefill, .*sampling: none"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path: Path, what: str, message: str) -> None:
    made = Made(tmp_path / "run").draw()
    infos = made.infos()
    if what == "lost":
        made.rows["steps"][2]["lost_rows"] = 12
    elif what == "dynamic":
        infos[1].top_k = None
    elif what == "two k":
        infos[1].top_k = 1
    elif what == "stages":
        Made(made.run, rank=1, changes={"layers": infos[:2]}).draw().write()
    elif what == "k lies":
        made.routing(0, 0, 1)["expert_ids"] = [0, 1, 2]
    else:
        made.rows["tokens"], made.rows["routing"] = [], []
        made.changes = {"sampling": "none"}
    made.changes["layers"] = infos
    made.write()
    with pytest.raises(ExportRefused, match=message) as e:
        export_trace(made.run, tmp_path / "out", "npy")
    assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# -- read back -------------------------------------------------------------------------------------


def _read(source: Any) -> list[Sequence]:
    return [x for rank in source.ranks for x in rank.items() if isinstance(x, Sequence)]


def test_the_importer_of_vllm_reads_arrays_back(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw().write()
    export_trace(made.run, tmp_path / "out", "npy")
    got = _read(vllm.open_source(tmp_path / "out/arrays", Given(experts=E)))
    assert [x.ids_TLK.tolist() for x in got] == [x.tolist() for x in made.truth.values()]


DENSE = Given(experts=E, top_k=K, blocks=6, dense_blocks=(0, 3, 5))


def test_the_importer_of_vllm_reads_responses_back(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw().write()
    out = tmp_path / "out.jsonl"
    export_trace(made.run, out, "vllm-responses", blocks=6)
    assert vllm.recognises(out, out.read_bytes()[:4096])
    source = vllm.open_source(out, DENSE)
    assert [x.block for x in source.layers] == [1, 2, 4]
    got = _read(source)
    assert [x.ids_TLK.tolist() for x in got] == [x.tolist() for x in made.truth.values()]
    assert [(x.request, x.tag, x.prompt_tokens) for x in got] == [
        ("r/0", "code", 4), ("r/1", "math", 2), ("r/2", "code", 5),
    ]  # fmt: skip


def test_the_importer_of_sglang_reads_responses_back(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw().write()
    out = tmp_path / "out.jsonl"
    export_trace(made.run, out, "sglang-responses", blocks=6)
    assert sglang_responses.recognises(out, out.read_bytes()[:4096])
    got = _read(sglang_responses.open_source(out, DENSE))
    assert [x.ids_TLK.tolist() for x in got] == [x.tolist() for x in made.truth.values()]
    assert [(x.request, x.prompt_tokens) for x in got] == [("r/0", 4), ("r/1", 2), ("r/2", 5)]


def test_engines_need_decoder_blocks(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", blocks=(None, 2, 4)).draw().write()
    with pytest.raises(ExportRefused, match=r"\(layer 0\), and engines number them by decoder"):
        export_trace(made.run, tmp_path / "out.jsonl", "vllm-responses")


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").draw().write()
    out = tmp_path / "out"
    out.mkdir()
    export_trace(made.run, out, "npy")  # an empty one is
    with pytest.raises(ExportRefused, match="is there already: replace it with --force"):
        export_trace(made.run, out, "npy")
    export_trace(made.run, out, "npy", force=True, without_last=True)
    assert len(arrays(out)[0]) == 6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(ExportRefused, match="is a folder of something else"):
        export_trace(made.run, tmp_path / "mine", "npy", force=True)
    (out / "thesis.tex").write_text("x")  # beside an index of ours, or of whomever
    with pytest.raises(ExportRefused, match="is a folder of something else"):
        export_trace(made.run, out, "npy", force=True)
    assert (out / "thesis.tex").exists()

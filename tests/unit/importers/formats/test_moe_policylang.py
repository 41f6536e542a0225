"""moe-policylang's rows: what its recorder writes (see support.engines.policylang), and damage."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.engines.policylang import Recorded, recorded, write, write_jsonl, write_parquet
from support.routed import counted, routed

import moe_lens
from moe_lens.errors import ImportRefused
from moe_lens.importers.formats import _policylang_rows, format_of, moe_policylang
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Given, Pass, Source

NAMES = ("trace.parquet", "trace.jsonl")
E = Given(experts=6)


def passes(source: Source) -> list[Pass]:
    out = list(source.ranks[0].items())
    assert all(isinstance(x, Pass) for x in out)
    return out  # type: ignore[return-value]


def by_key(of: Recorded) -> dict[tuple[int, int, int], dict[str, Any]]:
    return {(r["prompt_id"], r["token_idx"], r["layer_idx"]): r for r in of.rows}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("some", [1, 7, 1000])  # rows read at a time: forwards are cut anywhere
def test_forwards_are_those_that_ran(
    tmp_path: Path, name: str, some: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_policylang_rows, "SOME", 4 * some if name.endswith("l") else some)
    of = recorded()
    source = moe_policylang.open_source(write(tmp_path / name, of), Given())
    assert [(x.layer, x.block, x.experts, x.top_k) for x in source.layers] == [
        (0, 1, 6, 2), (1, 2, 6, 2), (2, 4, 6, 2),
    ]  # fmt: skip
    got = passes(source)
    truth = by_key(of)
    assert len(got) == len(of.forwards)
    for x, (prompt, first, T) in zip(got, of.forwards, strict=True):
        assert (x.step, x.phase) == (prompt, "decode" if first else "prefill")
        assert x.tokens is not None
        assert x.tokens.position_T.tolist() == list(range(first, first + T))
        assert set(x.tokens.sequence_T.tolist()) == {prompt}
        assert x.tokens.tags == (("code", "chat")[prompt],)
        ids = [truth[prompt, first + t, 1]["token_id"] for t in range(T)]
        assert (x.tokens.token_id_T is None) == (None in ids)  # its recorder has none of decoding
        if x.tokens.token_id_T is not None:
            assert x.tokens.token_id_T.tolist() == ids
        for i, block in enumerate(of.layers):
            for t in range(T):
                row = truth[prompt, first + t, block]
                c: Any = x.choices[i]
                assert c.ids_TK[t].tolist() == row["selected_experts"]
                assert np.array_equal(c.weights_TK[t], np.float32(row["router_scores"]))
                assert np.array_equal(c.prob_TE[t], np.float32(row["router_softmax"]))
                assert np.array_equal(c.logits_TE[t], of.logits[prompt, first + t, block])
    assert [x.forward for x in got] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_the_trace_says_what_a_loop_over_the_file_says(tmp_path: Path, name: str) -> None:
    of = recorded((4, 1, 6), 4)
    path = write(tmp_path / name, of)
    assert format_of(path) == "moe-policylang"
    done = import_trace(path, tmp_path / "run")
    looped: Counter[tuple[int, int]] = Counter()
    for row in of.rows:
        for expert in row["selected_experts"]:
            looped[of.layers.index(row["layer_idx"]), expert] += 1
    assert counted(done.run) == looped
    for (prompt, position), ids_LK in routed(done.run).items():
        rows = [by_key(of)[prompt, position, layer] for layer in of.layers]
        assert ids_LK.tolist() == [r["selected_experts"] for r in rows]
    assert done.steps == ""  # as they ran
    with moe_lens.open(done.run) as trace:
        found: Any = trace.sql(
            "select sequence s, position p, layer l, entropy from routing join tokens "
            "using (step, forward, token)"
        ).rows()
        assert trace.info().runs[0].lacks.keys() == {"times", "losses"}
        assert any("before the model normalises" in w for w in trace.info().runs[0].warnings)
    assert len(found) == len(of.rows)
    for row in found:
        p = np.float64(by_key(of)[row["s"], row["p"], of.layers[row["l"]]]["router_softmax"])
        assert row["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=0.01)


def test_a_file_that_knows_little_says_so(tmp_path: Path) -> None:
    of = recorded(full=False)
    path = write_parquet(tmp_path / "t.parquet", of)
    with pytest.raises(ImportRefused, match="do not say of how many experts: give --experts"):
        moe_policylang.open_source(path, Given())
    source = moe_policylang.open_source(path, E)
    assert source.lacks.keys() == {"times", "losses", "token ids", "phases", "tags", "entropy"}
    assert {x.phase for x in passes(source)} == {"unknown"}
    for row in of.rows:
        del row["router_scores"]
    source = moe_policylang.open_source(write_jsonl(tmp_path / "t.jsonl", of), Given())
    assert source.layers[0].experts == 6  # its header says
    assert source.model == "tiny"
    assert "weights" in source.lacks
    assert passes(source)[0].choices[0].weights_TK is None


def test_a_language_is_the_tag_where_there_is_no_domain(tmp_path: Path) -> None:
    of = recorded()
    for row in of.rows:
        row["domain_tag"] = None
    source = moe_policylang.open_source(write_parquet(tmp_path / "t.parquet", of), Given())
    assert {x.tokens.tags for x in passes(source) if x.tokens} == {("en",), ("de",)}


def test_a_distribution_that_was_made_up_is_left_out(tmp_path: Path) -> None:
    of = recorded((9,), 1)
    for row in of.rows:  # vllm_extensions.py:98-113
        softmax = np.full(6, 1e-4)
        w = np.array(row["router_scores"]) / sum(row["router_scores"])
        softmax[row["selected_experts"]] = 1e-4 + w * (1 - 4e-4 - 2e-4)
        row["router_softmax"] = softmax.tolist()
    source = moe_policylang.open_source(write_parquet(tmp_path / "t.parquet", of), Given())
    assert "entropy" in source.lacks
    assert moe_policylang.MADE_UP in source.notes
    assert all(x.choices[0].prob_TE is None for x in passes(source))


def test_one_layer_needs_phases_to_tell_forwards(tmp_path: Path) -> None:
    of = recorded(layers=(0,))
    got = passes(moe_policylang.open_source(write_parquet(tmp_path / "a.parquet", of), Given()))
    assert [x.tokens and len(x.tokens.position_T) for x in got] == [5, 1, 1, 3, 1, 1]
    of = recorded(layers=(0,), full=False)
    with pytest.raises(ImportRefused, match="record_phase=True"):
        moe_policylang.open_source(write_parquet(tmp_path / "b.parquet", of), E)


def test_files_of_others_are_not_recognised(tmp_path: Path) -> None:
    other = tmp_path / "x.parquet"
    pq.write_table(
        pq.read_table(write_parquet(tmp_path / "t.parquet", recorded())).select([0]), other
    )
    for head in (
        other.read_bytes()[:4096],
        b"PAR1",
        b"",
        b"{}\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b"[" * 9999,
    ):
        assert not moe_policylang.recognises(other, head)


# -- damage ----------------------------------------------------------------------------------------

Damage = Callable[[list[dict[str, Any]]], object]


def _swap(rows: list[dict[str, Any]], a: int, b: int) -> None:
    rows[a], rows[b] = rows[b], rows[a]


def _by_token(rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda r: (r["prompt_id"], r["token_idx"], r["layer_idx"]))


def _by_layer(rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda r: (r["layer_idx"], r["prompt_id"], r["token_idx"]))


ROWS: dict[str, tuple[Damage, str]] = {
    "a row is gone": (
        lambda r: r.pop(7),
        r"ROW7: prompt 0: layer 2, token 3, where layer 2, token 2 should be\.",
    ),
    "the last rows are gone": (
        lambda r: r.__delitem__(slice(-1, None)),
        r"ROW35: prompt 1: nothing, where layer 4, token 4 should be\.",
    ),
    "a row is there twice": (
        lambda r: r.insert(3, dict(r[3])),
        r"ROW4: prompt 0: layer 1, token 3, where layer 1, token 4 should be\.",
    ),
    "a forward is gone": (
        lambda r: r.__delitem__(slice(15, 18)),
        r"ROW15: prompt 0: layer 1, token 6, where layer 1, token 5 should be\.",
    ),
    "a prompt begins in its middle": (
        lambda r: r.__delitem__(slice(21, 30)),
        r"ROW21: prompt 1: layer 1, token 3, where layer 1, token 0 should be\.",
    ),
    "two rows are swapped": (
        lambda r: _swap(r, 1, 2),
        r"ROW1: prompt 0: layer 1, token 2, where layer 1, token 1 should be\.",
    ),
    "sorted by token": (_by_token, r"ROW3, prompt 0: the prompt in a second forward: rows are not"),
    "sorted by layer": (_by_layer, r"ROW7: prompt 0: nothing, where layer 2, token 0"),
    "prompts the other way round": (
        lambda r: r.sort(key=lambda x: -x["prompt_id"]),
        r"ROW15: prompt 0 after prompt 1: each in one piece\.",
    ),
    "three experts": (
        lambda r: r[4].update(selected_experts=[0, 1, 2]),
        r"ROW4: 3 selected_experts, but 2 in the row before\.",
    ),
    "an expert out of range": (
        lambda r: r[2].update(selected_experts=[0, 6]),
        r"ROW0, prompt 0, layer 0, token 2: expert 6 of 6\.",
    ),
    "an expert twice": (
        lambda r: r[6].update(selected_experts=[5, 5]),
        r"ROW0, prompt 0, layer 1, token 1: \[5, 5\] names an expert twice",
    ),
    "no scores in one row": (
        lambda r: r[5].update(router_scores=None),
        r"ROW5: no router_scores\.",
    ),
    "a distribution that is none": (
        lambda r: r[8].update(router_softmax=[0.5] * 6),
        r"ROW8: router_softmax adds up to 3\.",
    ),
    "two phases in a forward": (
        lambda r: r[9].update(phase="decode"),
        r"ROW9: another phase than in the rows before, of the same forward\.",
    ),
    "another tag in a prompt": (
        lambda r: [x.update(domain_tag="math") for x in r[15:18]],
        r"ROW15, prompt 0: tag 'math' after 'code'\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ROWS)
def test_damaged_rows_are_refused_by_name(tmp_path: Path, name: str, what: str) -> None:
    damage, message = ROWS[what]
    of = recorded()
    damage(of.rows)
    path = write(tmp_path / name, of)
    first = 2 if name == "trace.jsonl" else 0
    word = "line" if first else "row"
    for number in range(60, -1, -1):
        message = message.replace(f"ROW{number}", f"{word} {number + first}")
    with pytest.raises(ImportRefused, match=message) as e:
        import_trace(path, tmp_path / "run")
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def _changed(line: str, **more: Any) -> str:
    return json.dumps(json.loads(line) | more) + "\n"


def _line_4(**more: Any) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        lines = _lines(path)
        path.write_text("".join([*lines[:3], _changed(lines[3], **more), *lines[4:]]))

    return damage


LINES: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (
        lambda p: p.write_text(p.read_text()[:-20]),
        r"line 37 is no JSON \(.*\): the file ends in the middle of it\.",
    ),
    "cut at a line": (
        lambda p: p.write_text("".join(_lines(p)[:-9])),
        r"27 rows, but its first line speaks of 36",
    ),
    "no header": (
        lambda p: p.write_text("".join(_lines(p)[1:])),
        r"line 1 has no num_layers: it is no header",
    ),
    "no token_idx": (
        lambda p: p.write_text(p.read_text().replace('"t"', '"T"')),
        r"has no column token_idx: it is no trace of moe-policylang",
    ),
    "a word for a number": (
        lambda p: p.write_text(p.read_text().replace('"t": 3', '"t": "three"', 1)),
        r"line 5: token_idx is 'three', not a number\.",
    ),
    "a number for a list": (
        _line_4(e=7),
        r"line 4: selected_experts is 7, not a list of numbers\.",
    ),
    "a float for an expert": (
        _line_4(e=[1.5, 2]),
        r"line 2: selected_experts is a list of double\.",
    ),
    "a token id of 40 bits": (
        _line_4(ti=1 << 40),
        r"line 4: token_id is 1099511627776\.",
    ),
    "a token id of 70 bits": (
        _line_4(ti=1 << 70),
        r"line 4: token_id is 1180591620717411303424, not a number\.",
    ),
    "half a character for a number": (
        _line_4(t="\ud800"),
        r"line 4: token_idx is '.ud800', not a number\.",
    ),
    "an expert of 70 bits": (
        _line_4(e=[1, 1 << 70]),
        r"line 4: selected_experts is \[1, 1180591620717411303424\], not a list of numbers\.",
    ),
    "half a character": (
        _line_4(dm="\ud800"),
        r"line 2: domain_tag is no text",
    ),
    "scores from the second line on": (
        lambda p: p.write_text(
            "".join([_lines(p)[0], _changed(_lines(p)[1], s=None), *_lines(p)[2:]])
        ),
        r"line 3 has 's', which line 2 has not\.",
    ),
    "a list, not an object": (
        lambda p: p.write_text("".join([*_lines(p)[:3], "[1, 2]\n"])),
        r"line 4 is no JSON object\.",
    ),
    "a header of other layers": (
        lambda p: p.write_text(p.read_text().replace('"num_layers": 3', '"num_layers": 4')),
        r"rows of 3 layers, but its first line speaks of 4\.",
    ),
    "a header of another top-k": (
        lambda p: p.write_text(p.read_text().replace('"top_k": 2', '"top_k": 8')),
        r"choices a token contradict each other: 8 by its first line, 2 by selected_experts\.",
    ),
    "a header of other experts": (
        lambda p: p.write_text(p.read_text().replace('"num_experts": 6', '"num_experts": 8')),
        r"experts contradict each other: 8 by its first line, 6 by router_softmax",
    ),
    "a tag that is a number": (
        lambda p: p.write_text(p.read_text().replace('"dm": "code"', '"dm": 3')),
        r"line 2: domain_tag is no text",
    ),
    "nothing but a header": (
        lambda p: p.write_text(_lines(p)[0].replace('"num_entries": 36', '"num_entries": 0')),
        r"has no rows\.",
    ),
}


@pytest.mark.parametrize("what", LINES)
def test_damaged_lines_are_refused_by_name(tmp_path: Path, what: str) -> None:
    damage, message = LINES[what]
    path = write_jsonl(tmp_path / "trace.jsonl", recorded())
    damage(path)
    with pytest.raises(ImportRefused, match=message) as e:
        import_trace(path, tmp_path / "run", format="moe-policylang")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def _columns(path: Path, change: Callable[[Any], Any]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


PARQUET: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (
        lambda p: p.write_bytes(p.read_bytes()[:-30]),
        r"is no whole Parquet file",
    ),
    "no choices": (
        lambda p: _columns(p, lambda t: t.drop_columns(["selected_experts"])),
        r"has no column selected_experts: .* an old one that recorded no choices",
    ),
    "floats for layers": (
        lambda p: _columns(
            p, lambda t: t.set_column(2, "layer_idx", t["layer_idx"].cast("float32"))
        ),
        r"row 0: layer_idx is float, not an integer\.",
    ),
    "experts as text": (
        lambda p: _columns(p, lambda t: t.set_column(3, "selected_experts", t["phase"])),
        r"row 0: selected_experts is string, not a list\.",
    ),
    "scores as integers": (
        lambda p: _columns(p, lambda t: t.set_column(4, "router_scores", t["selected_experts"])),
        r"row 0: router_scores is a list of int32\.",
    ),
}


@pytest.mark.parametrize("what", PARQUET)
def test_damaged_columns_are_refused_by_name(tmp_path: Path, what: str) -> None:
    damage, message = PARQUET[what]
    path = write_parquet(tmp_path / "trace.parquet", recorded())
    damage(path)
    with pytest.raises(ImportRefused, match=message) as e:
        import_trace(path, tmp_path / "run", format="moe-policylang")
    assert "\n" not in str(e.value)


def test_a_page_that_rotted_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "trace.parquet", recorded((400,), 1))
    whole = bytearray(path.read_bytes())
    whole[200:4000] = bytes(3800)
    path.write_bytes(whole)
    with pytest.raises(ImportRefused, match="cannot be read"):
        import_trace(path, tmp_path / "run")


def test_a_short_header_is_read_as_json(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", recorded())
    assert moe_policylang.recognises(path, json.dumps(recorded().header()).encode() + b"\n{")

"""llama.cpp's rows of layer,expert (see support.engines.llama_cpp), and damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engines.llama_cpp import Traced, traced, write_csv
from support.routed import counted

import moe_lens
from moe_lens.errors import ImportRefused
from moe_lens.importers.formats import format_of, llama_cpp
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Counted, Given, Pass

GIVEN = Given(experts=8, top_k=2)


def items(path: Path, given: Given = GIVEN) -> list[Any]:
    return list(llama_cpp.open_source(path, given).ranks[0].items())


def looped(of: Traced) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for f in range(len(of.forwards)):
        for layer in range(len(of.blocks)):
            for token in of.ids(f, layer).tolist():
                for expert in token:
                    found[layer, expert] += 1
    return found


@pytest.mark.parametrize("some", [8, 100, 1 << 20])  # bytes read at a time
@pytest.mark.parametrize("ubatch", [5, 512])
def test_forwards_are_those_that_ran(
    tmp_path: Path, ubatch: int, some: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "_SOME", some)
    of = traced(ubatch=ubatch)
    path = write_csv(tmp_path / "t.csv", of)
    assert [x.block for x in llama_cpp.open_source(path, GIVEN).layers] == [1, 2, 3]
    got = items(path)
    assert len(got) == len(of.forwards)
    position = 0
    for f, x in enumerate(got):
        T = of.forwards[f].shape[1]
        assert x.step == f
        assert x.phase == ("prefill" if T > 1 else "decode")
        if T > 1:
            assert isinstance(x, Counted)
            for layer, count_E in x.count_E.items():
                expected = np.bincount(of.ids(f, layer).ravel(), minlength=8)
                assert count_E.tolist() == expected.tolist()
        else:
            assert isinstance(x, Pass)
            assert x.tokens is not None
            assert x.tokens.position_T.tolist() == [position]
            for layer, c in x.choices.items():
                assert c.ids_TK.tolist() == of.ids(f, layer).tolist()
        position += T


@pytest.mark.parametrize("cut_last", [True, False])
def test_the_trace_says_what_a_loop_over_the_file_says(tmp_path: Path, cut_last: bool) -> None:
    of = traced(40, 9, cut_last=cut_last)
    path = write_csv(tmp_path / "t.csv", of)
    assert format_of(path) == "llama.cpp"
    done = import_trace(path, tmp_path / "run", given=GIVEN)
    assert counted(done.run) == looped(of)
    with moe_lens.open(done.run) as trace:
        phases: Any = trace.sql("select phase, tokens from steps order by step").rows()
        rows: Any = trace.sql("select count(*) as n from tokens").rows()
        assert trace.info().runs[0].lacks.keys() == llama_cpp.LACKS.keys()
    assert [(r["phase"], r["tokens"]) for r in phases] == [("prefill", 40)] + [("decode", 1)] * 9
    assert rows[0]["n"] == (9 if cut_last else 49)


def test_a_prompt_of_one_token(tmp_path: Path) -> None:
    got = items(write_csv(tmp_path / "t.csv", traced(1, 2)))
    assert [x.phase for x in got] == ["decode"] * 3


def test_whole_orders_are_not_taken_for_choices(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", traced(), strided=False)
    with pytest.raises(ImportRefused, match="no expert is chosen twice among 8 choices, in any"):
        items(path)
    assert items(write_csv(tmp_path / "right.csv", traced()))


def test_what_is_not_in_the_file_must_be_given(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", traced())
    with pytest.raises(ImportRefused, match="do not say of how many experts: give --experts N"):
        items(path, Given(top_k=2))
    with pytest.raises(ImportRefused, match="of how many choices a token: give --top-k K"):
        items(path, Given(experts=8))


def test_files_of_others_are_not_recognised(tmp_path: Path) -> None:
    for head in (b"", b"phase,token,layer,rank,expert\n", b"1,2,3\n", b"1;2\n", b"\xff,1\n"):
        assert not llama_cpp.recognises(tmp_path / "x", head)
    assert llama_cpp.recognises(tmp_path / "x", b"3,41\r\n3,7\r\n")
    assert not llama_cpp.recognises(tmp_path, b"")


def _edit(change: Callable[[list[str]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        change(lines)
        path.write_text("".join(lines))

    return edit


# 12 tokens in blocks 1 and 2 and one in block 3: lines 1-24, 25-48, 49-50; then 6 a forward.
DAMAGE: dict[str, tuple[Callable[[Path], object], Given, str]] = {
    "torn": (
        lambda p: p.write_text(p.read_text()[:-1]),
        GIVEN, r"line 68: the file ends in the middle of it: it is torn\.",
    ),
    "the last layer is gone": (
        _edit(lambda x: x.__delitem__(slice(-2, None))),
        GIVEN, r"line 67: the file ends, or a forward begins, where layer 3 should be",
    ),
    "a line is gone": (
        _edit(lambda x: x.pop(30)),
        GIVEN, r"line 25, layer 2: 23 choices are no multiple of top-2: lines are missing",
    ),
    "a layer is gone in one forward": (
        _edit(lambda x: x.__delitem__(slice(52, 54))),
        GIVEN, r"line 53: layer 3, where layer 2 should be: lines are missing, or another order\.",
    ),
    "a token is gone in one layer": (
        _edit(lambda x: x.__delitem__(slice(26, 28))),
        GIVEN, r"line 1: layers of \[12, 11, 1\]… tokens: lines are missing, or the top-k",
    ),
    "an empty line": (
        _edit(lambda x: x.insert(9, "\n")),
        GIVEN, r"line 10: '' is no layer,expert\.",
    ),
    "a third number": (
        _edit(lambda x: x.__setitem__(4, "1,2,3\n")),
        GIVEN, r"line 5: '1,2,3' is no layer,expert\.",
    ),
    "a word": (
        _edit(lambda x: x.__setitem__(4, "1,two\n")),
        GIVEN, r"line 5: '1,two' is no layer,expert\.",
    ),
    "no layer": (
        _edit(lambda x: x.__setitem__(4, "-1,2\n")),
        GIVEN, r"line 5: layer -1\.",
    ),
    "an expert too many": (
        _edit(lambda x: x.__setitem__(4, "1,8\n")),
        GIVEN, r"line 5: expert 8 of 8: check --experts\.",
    ),
    "an expert twice": (
        _edit(lambda x: x.__setitem__(5, x[4])),
        GIVEN, r"line 1, layer 0, token 2: \[(\d), \1\] names an expert twice: the top-k is",
    ),
    "half the top-k": (
        lambda p: write_csv(p, traced(top_k=4)),
        GIVEN, r"line 1: layers of \[24, 24, 2\]… tokens: lines are missing, or the top-k",
    ),
    "twice the top-k": (
        lambda p: None,
        Given(experts=8, top_k=4), r"line 49, layer 3: 2 choices are no multiple of top-4",
    ),
    "two files in one": (
        lambda p: p.write_text(2 * p.read_text()),
        GIVEN, r"line 69: 12 tokens at a time after 1: a second prompt begins here",
    ),
    "columns of another tool": (
        _edit(lambda x: x.insert(0, "phase,token,layer,rank,expert\n")),
        GIVEN, r"line 1 is 'phase,token,layer,rank,expert': this reads llama\.cpp's own moe-trace",
    ),
    "a single layer": (
        lambda p: write_csv(p, traced(blocks=(5,))),
        GIVEN, r"rows of a single layer \(5\) do not tell forwards apart\.",
    ),
    "empty": (lambda p: p.write_text(""), GIVEN, r"t\.csv has no rows\."),
}  # fmt: skip


@pytest.mark.parametrize("some", [16, 1 << 20])  # bytes read at a time
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_by_line(
    tmp_path: Path, what: str, some: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "_SOME", some)
    damage, given, message = DAMAGE[what]
    path = write_csv(tmp_path / "t.csv", traced())
    damage(path)
    with pytest.raises(ImportRefused, match=message) as e:
        import_trace(path, tmp_path / "run", format="llama.cpp", given=given)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()

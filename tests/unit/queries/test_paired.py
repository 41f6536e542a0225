"""`paired`: planted routers, alignments, and what is refused."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.paired_prompts import EXPERTS, by_id, by_last, by_position, write_prompts

from moe_lens.errors import QueryError
from moe_lens.queries.paired import Paired, paired
from moe_lens.queries.pairing import numbered
from moe_lens.queries.session import open_trace
from moe_lens.trace.synthetic import Spec, generate

X, Y = list(range(10, 22)), list(range(40, 50))
"""Ids of two contents."""
START = [1, 2, 3, 4, 5]
SWAPPED = [("p", "a", X + Y), ("p", "b", Y + X)]
OTHERS = [(None, None, random.Random(n).sample([*X, *Y, *START], 20)) for n in range(6)]


def found(tmp_path: Path, prompts: Any, routers: Any, **asked: Any) -> Paired:
    written = {k: asked.pop(k) for k in ("token_ids", "keys", "skipped", "phase") if k in asked}
    written["requests"] = asked.pop("of_requests", 1000)
    path = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    write_prompts(path, prompts, routers, **written)
    with open_trace(path) as trace:
        return paired(trace, **asked)


def layer(of: Paired, n: int = 0) -> dict[str, Any]:
    return of.layers.to_dict("records")[n]


def test_sequences_are_numbered_by_their_texts() -> None:
    rows = pd.DataFrame({"rank": [0, 0, 0, 1, 0, 1], "sequence": [3, 3, 1, 3, 7, 1]})
    of_pair = {(0, 3): "a", (0, 7): "a", (1, 3): "b"}
    assert numbered(rows, of_pair).tolist() == [0, 1, 2, 0, 3]
    assert numbered(rows, {}).tolist() == [0, 1, 2, 3, 4]


def test_a_router_of_ids_is_context_free_and_others_are_not(tmp_path: Path) -> None:
    of = found(tmp_path, [*SWAPPED, *OTHERS], [by_id, by_last, by_position])
    ids, last, place = (layer(of, n) for n in range(3))
    assert ids["tokens"] == last["tokens"] == place["tokens"] == 22
    assert ids["overlap"] == ids["id_overlap"] == ids["id_part"] == 1
    assert ids["set_changed"] == ids["first_changed"] == ids["weight_change"] == 0
    assert ids["jsd"] == 0 < ids["jsd_floor"]
    # Of each block but the first of its prompt only the first token sees another one before it.
    by_distance = of.by_distance[of.by_distance["layer"] == 1].set_index("first")["set_changed"]
    assert by_distance.to_dict() == {0: 1, 1: 0, 2: 0, 4: 0, 8: 0}
    assert last["set_changed"] == 2 / 22
    assert last["id_part"] < 0.3 < last["content_part"]
    # X moves by 10, Y by 12: two and four experts further on.
    moved = [*((i, i + 10) for i in range(12)), *((i + 12, i) for i in range(10))]
    shared = [len({*by_position([], a)} & {*by_position([], b)}) / 2 for a, b in moved]
    assert place["overlap"] == pytest.approx(sum(shared) / 22)
    assert place["set_changed"] == 1


def test_the_same_prompt_twice_is_no_pair_in_another_order(tmp_path: Path) -> None:
    prompts = [("p", "a", X + Y), ("p", "a", X + Y), *OTHERS]
    for asked in ({}, {"align": "position"}):  # by ids, and by the variant that both have
        row = layer(found(tmp_path, prompts, [by_last], **asked))
        assert (row["same_tokens"], row["same_changed"], row["same_weight_change"]) == (22, 0, 0)
        assert row["tokens"] == row["pairs"] == 0
        assert math.isnan(row["overlap"])


def test_what_was_not_moved_stands_apart(tmp_path: Path) -> None:
    prompts = [("p", "a", START + X + Y), ("p", "b", START + Y + X)]
    of = found(tmp_path, prompts, [by_last])
    row = layer(of)
    assert (row["before_tokens"], row["before_changed"], row["tokens"]) == (5, 0, 22)
    assert of.pairs.to_dict("records") == [
        {"pair": "p", "rank_a": 0, "sequence_a": 0, "rank_b": 0, "sequence_b": 1, "same": False,
         "tokens_a": 27, "tokens_b": 27, "aligned": 27, "blocks": 3}]  # fmt: skip
    assert of.tokens.loc[of.tokens["distance"] == 0, "position"].tolist() == [5, 17]
    assert of.by_position["tokens"].tolist() == [3, 8, 11]  # from 5: to 7, 15 and 26


def test_the_null_is_known_in_one_phase_too(tmp_path: Path) -> None:
    """A prompt twice, and one behind two beginnings; six tokens that all of them decode."""
    tail = [1, 2, 3, 4, 5, 6]
    prompts = [("p", "a", X + tail), ("p", "b", X + tail), ("q", "a", Y[:5] + X + tail),
               ("q", "b", Y[5:] + X + tail)]  # fmt: skip
    write_prompts(tmp_path / "run", prompts, [by_last], decoded=6)
    with open_trace(tmp_path / "run") as trace:
        whole, decode = paired(trace), paired(trace, phase="decode")
    row = layer(decode)
    assert (row["same_tokens"], row["same_changed"], row["before_tokens"]) == (6, 0, 0)
    assert (row["tokens"], row["pairs"]) == (6, 1)
    # The cut is where it is in the whole prompt, not where the phase begins.
    assert decode.tokens.loc[decode.tokens["pair"] == "q", "distance"].tolist() == [
        *range(12, 18)]  # fmt: skip
    assert decode.pairs["same"].tolist() == whole.pairs["same"].tolist() == [True, False]


def test_rows_that_begin_late_are_the_same_where_the_variant_says_so(tmp_path: Path) -> None:
    late = [(n, p) for n in range(2) for p in range(4)]  # as of a prompt that a cache had
    twice = [("p", "a", X), ("p", "a", X)]
    assert layer(found(tmp_path, twice, [by_last], skipped=late))["same_tokens"] == 8
    # Else nothing says what stood before them.
    row = layer(found(tmp_path, [("p", "a", X), ("p", "b", X)], [by_last], skipped=late))
    assert (row["same_tokens"], row["tokens"]) == (0, 8)


@pytest.mark.parametrize("align", ["position", "end"])
def test_a_word_was_exchanged(tmp_path: Path, align: str) -> None:
    """Of the same ids only: what stands in its place is no such content."""
    other = [*X[:5], 90, 91, *X[7:]]
    of = found(tmp_path, [("p", "a", X), ("p", "b", other)], [by_last], align=align)
    assert of.tokens["position"].tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert of.tokens["distance"].tolist() == [-1] * 5 + [0, 1, 2, 3, 4]
    row = layer(of)
    assert (row["before_tokens"], row["before_changed"], row["tokens"]) == (5, 0, 5)
    assert row["set_changed"] == 1 / 5
    # Without ids every token counts, and each may be after the cut.
    blind = layer(found(tmp_path, [("p", "a", X), ("p", "b", other)], [by_last], align=align,
                        token_ids=False))  # fmt: skip
    assert (blind["before_tokens"], blind["tokens"], blind["set_changed"]) == (0, 12, 2 / 12)


def test_the_end_of_prompts_of_two_lengths(tmp_path: Path) -> None:
    prompts = [("p", "a", START + X), ("p", "b", Y + X)]  # 17 tokens, and 22
    of = found(tmp_path, prompts, [by_last], align="end")
    assert of.tokens[["position", "position_b"]].to_numpy().tolist() == [
        [n, n + 5] for n in range(5, 17)]  # fmt: skip
    assert of.tokens["distance"].tolist() == list(range(12))


def test_the_variant_says_which_comes_first_and_three_are_two_pairs(tmp_path: Path) -> None:
    prompts = [("p", "c", Y + X), ("p", "a", X + Y), ("p", "b", X + Y), ("q", "a", X)]
    of = found(tmp_path, prompts, [by_id])
    listed = of.pairs[["sequence_a", "sequence_b", "same"]].to_numpy().tolist()
    assert listed == [[1, 2, True], [1, 0, False]]
    named = found(tmp_path, prompts, [by_id], keys=("pair",))
    assert named.pairs["sequence_a"].tolist() == [0, 0]


def test_tokens_of_the_pair_itself_are_no_others(tmp_path: Path) -> None:
    row = layer(found(tmp_path, SWAPPED, [by_id]))
    assert row["id_known"] == 0
    assert math.isnan(row["id_overlap"])
    assert math.isnan(row["id_part"])
    assert row["overlap"] == 1


def test_alignments_that_the_user_declares(tmp_path: Path) -> None:
    prompts = [("p", "a", START + X), ("p", "b", Y + X)]
    without = {"token_ids": False}
    end = found(tmp_path, prompts, [by_last], align="end", **without)
    # 22 tokens against 17: the first five of b are nobody's.
    assert end.tokens[["position", "position_b"]].to_numpy().tolist() == [
        [n, n + 5] for n in range(17)]  # fmt: skip
    blocks = {"p": [[5, 10, 12]]}
    declared = found(tmp_path, prompts, [by_last], align=blocks, **without)
    assert declared.tokens["distance"].tolist() == list(range(12))
    assert declared.tokens["set_changed"].tolist() == [1] + [0] * 11
    assert math.isnan(layer(declared)["context_independence"])
    place = found(tmp_path, prompts, [by_last], align="position", **without)
    assert (place.tokens["position"] == place.tokens["position_b"]).all()
    assert len(place.tokens) == 17


def test_request_ids_make_pairs_too(tmp_path: Path) -> None:
    of = found(tmp_path, [(None, None, X), (None, None, Y + X)], [by_id], keys=(),
               requests=[("r1", "r0")])  # fmt: skip
    assert of.pairs[["pair", "sequence_a", "sequence_b", "aligned"]].to_numpy().tolist() == [
        ["r1=r0", 1, 0, 12]]  # fmt: skip


def test_tokens_without_rows_are_in_no_block(tmp_path: Path) -> None:
    of = found(tmp_path, SWAPPED, [by_id], skipped=[(0, 6)])
    assert of.pairs["aligned"].tolist() == [21]
    assert 6 not in of.tokens["position"].tolist()


def test_so_many_pairs_are_looked_at(tmp_path: Path) -> None:
    prompts = [(f"p{n}", v, ids) for n in range(3) for v, ids in (("a", X + Y), ("b", Y + X))]
    of = found(tmp_path, prompts, [by_id], pairs=2)
    assert of.pairs["pair"].tolist() == ["p0", "p1"]
    assert of.left_out == 1


@pytest.mark.parametrize(
    ("prompts", "asked", "says"),
    [
        (SWAPPED, {"keys": ()}, "no column 'pair' of `sequences`. Declare it"),
        (SWAPPED, {"variant": "order"}, "no column 'order' of `sequences` to order pairs by (it"),
        (SWAPPED, {"key": "prompt"}, "no column 'prompt' of `sequences` (it has pair, variant)"),
        ([("p", "a", X), ("q", "a", X)], {}, "No two sequences with rows share a value of 'pair'"),
        (SWAPPED, {"token_ids": False}, "aligned by token ids, and these rows have none: record"),
        (SWAPPED, {"requests": [("r0", "r9")]}, "request id 'r9' (2 have one)"),
        (SWAPPED * 2, {"of_requests": 3, "requests": [("r1", "r0")]}, "'r0' is of 2 sequences"),
        ([("p", "a", X), ("p", "b", Y)], {}, "No token of a pair stands in both"),
        (SWAPPED, {"align": {"p": [[0, 20, 9]]}}, "a block is [first position in the first"),
        (SWAPPED, {"align": {"q": []}}, "Blocks are given of 'q', which is no pair"),
        (SWAPPED, {"layers": [7]}, "There is no layer 7"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, prompts: Any, asked: Any, says: str) -> None:
    with pytest.raises(QueryError) as caught:
        found(tmp_path, prompts, [by_id], **asked)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [{"align": "sideways"}, {"pairs": 0}])
def test_bad_arguments(tmp_path: Path, asked: Any) -> None:
    with pytest.raises(ValueError, match=str(next(iter(asked.values())))):
        found(tmp_path, SWAPPED, [by_id], **asked)


@pytest.mark.parametrize(("independence", "part"), [(1.0, 1.0), (0.0, 0.0)])
def test_synthetic_pairs(tmp_path: Path, independence: float, part: float) -> None:
    """A synthetic token-id router is context-free; one of noise is nothing but order."""
    spec = Spec(steps=4, sequences=8, length=64, pairs=4, context_independence=independence,
                experts=EXPERTS)  # fmt: skip
    generate(tmp_path / "run", spec)
    with open_trace(tmp_path / "run") as trace:
        of = paired(trace)
    assert len(of.pairs) == 16
    for row in of.layers.to_dict("records"):
        assert row["tokens"] >= 16 * 60
        assert row["id_part"] == pytest.approx(part, abs=0.03)
        assert row["content_part"] == pytest.approx(0, abs=0.06)
        assert row["order_part"] == pytest.approx(1 - part, abs=0.06)
        assert row["context_independence"] == pytest.approx(part, abs=0.03)
        assert (row["set_changed"] == 0) == (independence == 1)
        assert row["random_overlap"] == pytest.approx(row["chance"], abs=0.15)

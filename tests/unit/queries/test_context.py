"""`conversations`: phases of a conversation, what counts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paired_prompts import EXPERTS, by_id, by_position, write_prompts
from support.traces import layer_info, meta, segment

from moe_lens.errors import QueryError
from moe_lens.queries.context import LayerContext, conversations
from moe_lens.queries.session import open_trace
from moe_lens.trace.layout import meta_path
from moe_lens.trace.meta import read_meta, write_meta
from moe_lens.trace.synthetic import Spec, generate


def measured(path: Path, **asked: Any) -> list[LayerContext]:
    with open_trace(path) as trace:
        return list(conversations(trace, **asked))


def recall(each: LayerContext, prefix: float, name: str, size: int) -> float:
    (found,) = [x for x in each.foretold if x.prefix == prefix]
    return float(found.recall[name][size - 1])


def test_a_topic_of_its_own_is_foretold_and_noise_is_not(tmp_path: Path) -> None:
    common = {"layers": 1, "steps": 6, "sequences": 8, "length": 128, "experts": 16, "topics": 16,
              "topic_strength": 3.0}  # fmt: skip
    generate(tmp_path / "own", Spec(**common, stay=1.0))
    generate(tmp_path / "noise", Spec(**common, stay=0.0))
    (own,) = measured(tmp_path / "own", prefixes=(16, 64))
    (noise,) = measured(tmp_path / "noise", prefixes=(16, 64))
    assert recall(own, 64, "prefix", 4) > recall(own, 64, "popularity", 4) + 0.3
    assert recall(own, 64, "prefix", 4) > recall(own, 64, "oracle", 4) - 0.03
    # Of topics that change with each token the beginning says no more than all other sequences.
    assert recall(noise, 64, "prefix", 4) < recall(noise, 64, "popularity", 4) + 0.01
    half = own.loads.loads.set_index("size").loc[8] if own.loads else None
    assert half is not None
    assert half["optimum"] <= half["prefix"] < half["popularity"] < half["cold"]


def test_prefill_and_decode_are_one_conversation_counted_apart(tmp_path: Path) -> None:
    """Two conversations: the prompt of 4 tokens in a forward, then 3 of one token each."""
    choices = [[0, 0, 1, 0, 0, 0, 2], [3, 3, 4, 4, 3, 4, 4]]
    write_meta(tmp_path, meta(layers=[layer_info(0, 6, 1)]))
    steps: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    routing: list[dict[str, Any]] = []
    for forward, (places, phase) in enumerate(
        [(range(4), "prefill"), *(([p], "decode") for p in (4, 5, 6))]
    ):
        where = {"step": 0, "forward": forward}
        steps.append({**where, "phase": phase, "tokens": 2 * len(places)})
        for n, (s, p) in enumerate((s, p) for s in (0, 1) for p in places):
            tokens.append({**where, "token": n, "sequence": s, "position": p})
            routing.append({**where, "layer": 0, "token": n, "expert_ids": [choices[s][p]],
                            "weights": [1.0]})  # fmt: skip
    for table, rows in (("steps", steps), ("tokens", tokens), ("routing", routing)):
        segment(tmp_path, table, rows)
    found = measured(tmp_path, prefixes=(1, 2), after=2)
    assert [x.phase for x in found] == ["prefill", "decode"]
    prefill, decode = found
    assert [x.tokens for x in found] == [14, 14]
    assert [(x.prefix, x.choices) for x in prefill.foretold] == [(1, 6), (2, 4)]
    assert [(x.prefix, x.choices) for x in decode.foretold] == [(1, 6), (2, 6)]
    assert recall(prefill, 2, "prefix", 1) == 1 / 4  # 1 0 and 4 4 after 0 0 and 3 3
    assert recall(decode, 2, "prefix", 1) == 3 / 6
    assert recall(decode, 2, "popularity", 2) == 0
    assert recall(decode, 2, "oracle", 1) == 4 / 6
    # Decoding begins after the prompt, where serving it left 0 and 4 (used last).
    assert decode.loads is not None
    assert decode.loads.requests == 6
    one = decode.loads.loads.iloc[0]
    assert (one["size"], one["cold"], one["prefix"], one["kept"]) == (1, 2 + 2, 1 + 1, 1 + 2)
    assert [x.phase for x in measured(tmp_path, prefixes=(1,), after=2, phase="decode")] == [
        "decode"]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        ({}, 0.0),  # only the four others are asked, which never choose its experts
        ({"key": "no such"}, 1.0),  # its twin knows them all
        ({"key": "variant"}, 1.0),
        ({"requests": [("r0", "r1")]}, 0.0),
        ({"requests": [("r0", "r2")]}, 1.0),
    ],
)
def test_popularity_is_of_other_texts(tmp_path: Path, asked: Any, known: float) -> None:
    """A pair all of id 1, which goes to experts 1 and 3; four prompts of id 4, to 4 and 6."""
    prompts = [("p", "a", [1] * 8), ("p", "b", [1] * 8),
               *[(None, str(n), [4] * 8) for n in range(4)]]  # fmt: skip
    write_prompts(tmp_path / "run", prompts, [by_id])
    (found,) = measured(tmp_path / "run", prefixes=(4,), after=4, **asked)
    # Four experts by popularity: 4 and 6, then 1 and 3 if anybody else chose them, else 0 and 1.
    assert recall(found, 4, "popularity", 4) == pytest.approx((4 + 2 * max(known, 0.5)) / 6)
    assert recall(found, 4, "prefix", 2) == 1
    assert found.loads is not None
    row = found.loads.loads.set_index("size").loc[4]
    assert row["popularity"] == 2 * (1 - known)


def test_sequences_without_their_beginning_are_left_out(tmp_path: Path) -> None:
    prompts = [(None, None, list(range(20)))] * 3
    write_prompts(tmp_path / "run", prompts, [by_id], skipped=[(1, 0), (2, 15)])
    (found,) = measured(tmp_path / "run", prefixes=(4,), after=4)
    assert (found.headless, found.sequences, found.tokens) == (1, 2, 39)


def test_layers_one_after_another_and_shares_of_a_sequence(tmp_path: Path) -> None:
    prompts = [(None, None, list(range(n, n + 16))) for n in range(4)]
    write_prompts(tmp_path / "run", prompts, [by_id, by_position])
    found = measured(tmp_path / "run", prefixes=(0.25, 8, 15), after=8, cover=1.0)
    assert [x.info.layer for x in found] == [0, 1]
    for each in found:
        assert [x.prefix for x in each.foretold] == [8, 15, 0.25]  # shares stand last
        assert [x.choices for x in each.foretold] == [4 * 8 * 2, 4 * 2, 4 * 12 * 2]
        assert all(x.covering <= EXPERTS for x in each.foretold)
    positions = found[1].foretold[0]  # 8 tokens: every expert twice, so none is foretold
    assert positions.covering == 8
    assert np.allclose(positions.recall["oracle"], np.arange(1, 9) / 8)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"prefixes": (64,), "after": 64}, "goes on after a beginning of 64 tokens: give smaller"),
        ({"phase": "decode", "prefixes": (2,)}, "of phase 'decode' (phases: eval)"),
        ({"layers": [4]}, "There is no layer 4"),
    ],
)
def test_what_cannot_be_measured(tmp_path: Path, asked: Any, says: str) -> None:
    write_prompts(tmp_path / "run", [(None, None, list(range(16)))] * 2, [by_id])
    with pytest.raises(QueryError) as caught:
        measured(tmp_path / "run", **asked)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "asked",
    [{"prefixes": (0,)}, {"prefixes": (2.5,)}, {"after": -1}, {"after": float("nan")},
     {"cover": 0}, {"cover": 1.1}],
)  # fmt: skip
def test_bad_arguments(tmp_path: Path, asked: Any) -> None:
    write_prompts(tmp_path / "run", [(None, None, list(range(16)))] * 2, [by_id])
    with pytest.raises(ValueError, match=r"must be above 0|a prefix is 1 token or more"):
        measured(tmp_path / "run", **asked)


def test_counts_alone_are_refused(tmp_path: Path) -> None:
    generate(tmp_path / "run", Spec(rows=False, steps=2))
    with pytest.raises(QueryError, match="no per-token rows, only counts"):
        measured(tmp_path / "run")


def test_a_first_token_that_nothing_computed_for_is_a_beginning_all_the_same(
    tmp_path: Path,
) -> None:
    """Of a layer that dropped all of it, or whose zero-compute expert it chose."""
    write_prompts(tmp_path / "run", [(None, None, list(range(12)))] * 2, [by_id])
    meta_ = read_meta(meta_path(tmp_path / "run", 0))
    meta_.layers = [layer_info(0, 2, zero_experts=EXPERTS - 2)]
    write_meta(tmp_path / "run", meta_)
    with open_trace(tmp_path / "run") as trace:
        starts = trace.query("sequence_starts").rows()
        (found,) = conversations(trace, prefixes=(4,), after=4)
    assert [(x["sequence"], x["first_position"], x["last_position"], x["tokens"])
            for x in starts] == [(0, 0, 11, 12), (1, 0, 11, 12)]  # fmt: skip
    assert found.headless == 0
    kept = [n for n in range(12) if min(by_id(range(12), n)) < 2]
    assert found.tokens == 2 * len(kept)
    asked = sum(e < 2 for n in range(4, 12) for e in by_id(range(12), n))
    # Its first token with an expert counts as the first: here token 0 has one.
    assert found.foretold[0].choices == 2 * asked


def test_where_sequences_start_by_phase_and_rank(tmp_path: Path) -> None:
    generate(tmp_path / "run", Spec(steps=1, sequences=2, length=5, phases=("serve",), decode=3,
                                    ranks=2))  # fmt: skip
    with open_trace(tmp_path / "run") as trace:
        decode = trace.query("sequence_starts", phase="decode").rows()
        every = trace.query("sequence_starts", rank=1).rows()
        none = trace.query("sequence_starts", first_step=1).rows()
    assert [(x["rank"], x["first_position"], x["last_position"], x["tokens"]) for x in decode] == [
        (0, 5, 7, 3), (0, 5, 7, 3), (1, 5, 7, 3), (1, 5, 7, 3)]  # fmt: skip
    assert [(x["rank"], x["first_position"], x["tokens"]) for x in every] == [(1, 0, 8)] * 2
    assert none == []

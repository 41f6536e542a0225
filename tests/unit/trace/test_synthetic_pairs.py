"""Pairs of synthetic sequences: what `sequences` says of them, and what their tokens are."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lens.queries.session import open_trace
from moe_lens.trace.synthetic import Spec, generate


def test_the_second_of_a_pair_is_the_first_with_its_blocks_reversed(tmp_path: Path) -> None:
    spec = Spec(steps=2, sequences=4, length=12, pairs=3, phases=("serve",), decode=2, ranks=2)
    generate(tmp_path / "run", spec)
    with open_trace(tmp_path / "run") as trace:
        said = trace.table("sequences").df().sort_values(["rank", "sequence"])
        tokens = trace.table("tokens").df().sort_values(["rank", "sequence", "position"])
    assert said["variant"].tolist() == ["a", "b"] * 8
    assert said["pair"].tolist() == [
        f"rank{r}-{n}" for r in (0, 1) for n in range(4) for _ in "ab"]  # fmt: skip
    ids = tokens.groupby(["rank", "sequence"])["token_id"].apply(list)
    tags = said.set_index(["rank", "sequence"])["tag"]
    for rank in (0, 1):
        for n in range(0, 8, 2):
            a, b = ids[rank, n], ids[rank, n + 1]
            assert b[:12] == a[8:12] + a[4:8] + a[:4]
            assert b[12:] == a[12:]
            assert tags[rank, n] == tags[rank, n + 1]


def test_one_block_is_the_same_prompt_twice(tmp_path: Path) -> None:
    spec = Spec(steps=1, sequences=2, length=8, pairs=1, context_independence=1.0)
    generate(tmp_path / "run", spec)
    with open_trace(tmp_path / "run") as trace:
        rows = trace.query("sequence_choices").df()
    first, second = (rows[rows["sequence"] == n].reset_index(drop=True) for n in (0, 1))
    assert first["token_id"].tolist() == second["token_id"].tolist()
    assert first["expert_ids"].map(list).tolist() == second["expert_ids"].map(list).tolist()


def test_without_pairs_there_are_no_keys(tmp_path: Path) -> None:
    generate(tmp_path / "run", Spec(steps=1))
    with open_trace(tmp_path / "run") as trace:
        assert not {"pair", "variant"} & set(trace.table("sequences").columns)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"pairs": -1}, "pairs is 0 .none. or the blocks of a prompt, got -1"),
        ({"pairs": 2, "sequences": 3}, "even number of sequences, got 3"),
        ({"pairs": 5, "length": 12}, "pairs divides the 12 tokens of a sequence"),
    ],
)
def test_what_cannot_be_paired(spec: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Spec(**spec)

"""Which layer tells tags apart, and the sentence of the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from support.traces import write_run

from moe_lens.queries.session import one_run, open_trace
from moe_lens.queries.tells_tags import TellsTags, tells_tags
from moe_lens.report.answers import gather
from moe_lens.report.facts import facts
from moe_lens.trace.synthetic import Domain, Spec, Specialist, generate

PLAIN = Spec(
    layers=3, experts=8, top_k=2, steps=4, sequences=16, length=32, phases=("train", "eval"),
    domain_strength=0.0, topic_strength=0.0, context_independence=0.0,
)  # fmt: skip


def found(run: Path, phase: str | None = None) -> tuple[TellsTags | None, str]:
    with open_trace(run) as trace:
        (answers,) = gather(trace, phase)
        said = facts(answers).get("tags", "")
        return tells_tags(trace, one_run(trace), phase), said


def test_the_planted_layer_is_found_and_said(tmp_path: Path) -> None:
    planted = (Specialist(5, "code", lift=3.0, layers=(1,)),)
    generate(tmp_path / "run", replace(PLAIN, planted=planted))
    most, said = found(tmp_path / "run")
    assert most is not None
    assert (most.phase, most.layer, most.layers, most.tokens) == ("eval", 1, 3, 1024)
    assert most.found.beyond == "high"
    assert said.startswith("layer 1 of 3 tells them apart most: its experts carry 0.")
    assert "(above all permutations of tags over sequences; eval, 1,024 tokens)" in said
    train, _ = found(tmp_path / "run", "train")
    assert train is not None
    assert (train.phase, train.layer) == ("train", 1)


def test_tags_that_mean_nothing_are_not_above_chance(tmp_path: Path) -> None:
    generate(tmp_path / "run", PLAIN)
    most, said = found(tmp_path / "run")
    assert most is not None
    assert most.found.beyond == ""
    assert "(not above all permutations" in said


def test_one_tag_and_counts_alone_say_nothing(tmp_path: Path) -> None:
    one = replace(PLAIN, domains=(Domain("code"),))
    generate(tmp_path / "one", one)
    assert found(tmp_path / "one") == (None, "")
    assert found(write_run(tmp_path / "counts", token_rows=False).path) == (None, "")

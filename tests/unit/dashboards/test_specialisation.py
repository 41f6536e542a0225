"""The Specialisation page: the catalogue's numbers, what can be chosen, what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.apptest import texts, tile, turned
from support.traces import write_run

from moe_lens.metrics.catalogue import measure, metrics
from moe_lens.numbers import digits
from moe_lens.queries.evidence import Evidences
from moe_lens.queries.session import one_run, open_trace
from moe_lens.trace.synthetic import Domain, Spec, Specialist, generate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "run"
    planted = (Specialist(2, "code", lift=2.0, layers=(1,)),)
    generate(path, Spec(layers=2, experts=8, top_k=2, steps=6, sequences=8, length=32,
                        domains=(Domain("code"), Domain("prose")), planted=planted))  # fmt: skip
    return path


def test_the_page_says_what_analyze_says(opened: Any, run: Path) -> None:
    wanted = [m for m in metrics().values() if m.group == "specialisation"]
    with open_trace(run) as trace:
        info = one_run(trace)
        known = Evidences(trace, info, "train", wanted).of(info.layers[1])
        found = {m.name: measure(m, known) for m in wanted}
    app = turned(opened(run), "specialisation")  # the layer where tags say most
    assert not app.exception
    for label, name in {
        "Tags, nats": "domain_information",
        "Strongest lift": "domain_lift",
        "Vocabulary": "vocabulary_specialisation",
    }.items():
        assert tile(app, label) == digits(found[name].value)
    assert found["domain_lift"].beyond == "high"
    said = texts(app)
    assert "code uses expert 2 2.0× as often as all" in said
    assert "1,536 tokens of 48 sequences" in said


def test_any_metric_can_be_drawn(opened: Any, run: Path) -> None:
    app = turned(opened(run, metric="context_independence"), "specialisation")
    assert not app.exception
    assert "Context independence: " in texts(app)


def test_counts_alone_show_tags_and_say_what_is_missing(opened: Any, tmp_path: Path) -> None:
    app = turned(opened(write_run(tmp_path / "run", token_rows=False).path), "specialisation")
    assert not app.exception
    assert "No rows of single tokens were kept." in texts(app)


def test_one_tag_is_no_error(opened: Any, tmp_path: Path) -> None:
    one = (Domain("code"),)
    generate(tmp_path / "run", Spec(layers=1, steps=2, sequences=2, length=16, domains=one))
    app = turned(opened(tmp_path / "run"), "specialisation")
    assert not app.exception
    said = texts(app)
    assert "fewer than two tags" in said.lower()


def test_no_rows_within_the_filters(opened: Any, run: Path) -> None:
    app = turned(opened(run, first_step="99"), "specialisation")
    assert not app.exception
    assert "Nothing was recorded within the filters." in texts(app)

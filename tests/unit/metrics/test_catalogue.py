"""The catalogue as a whole: complete entries, the page, what is said where data is lacking."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from moe_lens.metrics.catalogue import GROUPS, METRICS, Metric, measure, metrics
from moe_lens.metrics.evidence import DATA, LEVELS, Evidence
from moe_lens.metrics.page import markdown

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_page_is_generated_from_the_catalogue() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "renew it: make docs-metrics"


def test_every_metric_stands_on_the_page_once() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", markdown(), re.MULTILINE)
    assert listed == list(metrics())
    assert set(METRICS) == set(listed)


@pytest.mark.parametrize("metric", metrics().values(), ids=lambda m: m.name)
def test_entries_are_complete(metric: Metric) -> None:
    for text in (metric.formula, metric.range, metric.diagnoses, metric.null):
        assert text
    assert metric.diagnoses.endswith(".")
    assert metric.group in GROUPS
    assert set(metric.level) <= set(LEVELS)
    assert not (metric.drawn and metric.chance)
    # No null function only where the page says that there is none.
    assert (metric.drawn or metric.chance is not None) != metric.null.startswith("none")
    assert metric.reads


def test_data_names_fields() -> None:
    known = Evidence(experts=2, outputs=2)
    assert all(hasattr(known, name) for name in DATA)


@pytest.mark.parametrize("metric", metrics().values(), ids=lambda m: m.name)
def test_what_was_not_recorded_is_named(metric: Metric) -> None:
    found = measure(metric, Evidence(experts=4, outputs=4, top_k=2))
    assert found.lacks
    assert np.isnan(found.value)
    assert found.chance is None
    assert found.beyond == ""
    name = next(n for n in metric.reads if getattr(Evidence(experts=4, outputs=4), n) is None)
    why = Evidence(experts=4, outputs=4, top_k=2, why={name: "because"})
    assert measure(metric, why).lacks in ("because", found.lacks)


def test_a_value_may_stand_without_its_chance() -> None:
    """The recorded rate is there, and the capacity of whole forwards is not."""
    told = {"overflow_rate": 0.25, "dropped_rate": 0.25}
    found = measure(METRICS["overflow_rate"], Evidence(experts=4, outputs=4, dropped_tokens=told))
    assert (found.value, found.chance, found.beyond, found.lacks) == (0.25, None, "", "")


def test_levels_follow_from_what_is_read() -> None:
    assert METRICS["max_vio"].level == "C"
    assert METRICS["bf16_ties"].level == "Z"
    assert METRICS["top_k_mass"].level == "IZ"
    assert METRICS["max_vio"].needs == {"counts_E", "draws_RE", "tokens"}
    assert METRICS["scope_gap"].needs == {*("counts_FE", "prob_FV", "tokens_F", "step_F")}


def test_a_reason_of_its_own_comes_first() -> None:
    known = Evidence(experts=4, outputs=4, why={"counts_E": "experts choose"})
    assert measure(METRICS["max_vio"], known).lacks == "experts choose"
    assert measure(METRICS["gini"], Evidence(experts=4, outputs=4)).lacks == "no choices"

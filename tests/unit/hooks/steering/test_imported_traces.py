"""Forcing what was imported: it says what is missing, and where the trace is from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
from support.steering import TOKENS, record

import moe_lens
from moe_lens.errors import SteeringError
from moe_lens.trace.layout import meta_path
from moe_lens.trace.meta import read_meta, write_meta


def imported(model: Any, run: Any, **changes: Any) -> Any:
    """A recording that says that it was imported."""
    record(model, run)
    meta = read_meta(meta_path(run, 0))
    lacks = {"weights": "ids alone", "sequences": "rows of nobody", "tokens": "counts alone"}
    write_meta(run, replace(meta, imported="x: f.npz", lacks=lacks, weights="none", **changes))
    return run


def test_weights_that_are_not_there(model: Any, tmp_path: Any) -> None:
    run = imported(model, tmp_path / "run")
    with pytest.raises(SteeringError, match=r"no gate weights: imported from x: f.npz .ids alone."):
        moe_lens.force_routing(model, run, weights="recorded")
    with moe_lens.force_routing(model, run):
        model(TOKENS)


def test_forwards_that_no_engine_ran(model: Any, tmp_path: Any) -> None:
    run = imported(model, tmp_path / "run", steps="made up")
    with pytest.raises(SteeringError, match=r'no engine ran .made up.*force by="position"'):
        moe_lens.force_routing(model, run)


def test_tokens_of_nobody(model: Any, tmp_path: Any) -> None:
    run = imported(model, tmp_path / "run")
    shutil.rmtree(run / "tokens")
    for by in ("forward", "position"):
        with pytest.raises(SteeringError, match="rows of nobody"):
            moe_lens.force_routing(model, run, by=by)


def test_counts_alone(model: Any, tmp_path: Any) -> None:
    run = imported(model, tmp_path / "run")
    shutil.rmtree(run / "tokens")
    shutil.rmtree(run / "routing")
    with pytest.raises(SteeringError, match=r"no per-token rows: imported from x.*counts alone"):
        moe_lens.force_routing(model, run)

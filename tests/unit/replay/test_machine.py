"""Ceilings are kept per device, and used only where they are of it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_lens.replay import machine
from moe_lens.runtime.ceilings import Ceilings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def thread():
    with machine.one_thread(CPU):
        yield


def test_kept_and_found(ceilings: Ceilings, cache: Path) -> None:
    assert machine.stored(CPU) == ceilings
    assert machine.ceilings_path(CPU).is_relative_to(cache)
    found, where = machine.ceilings_of(CPU)
    assert found == ceilings
    assert where.startswith("stored ")
    assert where.endswith(" days ago")  # of 1970


def test_another_number_of_threads_is_another_machine() -> None:
    torch.set_num_threads(2)
    assert machine.stored(CPU) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"copy_bytes_per_s": 1}', "null"])
def test_damaged_ones_are_measured_again(
    damage: str, ceilings: Ceilings, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.ceilings_path(CPU).write_text(damage)
    assert machine.stored(CPU) is None
    monkeypatch.setattr(machine, "measure", lambda _: ceilings)
    assert machine.ceilings_of(CPU) == (ceilings, "measured now, and stored")
    assert machine.stored(CPU) == ceilings


def test_those_of_another_torch_are_not_used(ceilings: Ceilings) -> None:
    path = machine.ceilings_path(CPU)
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, "versions": {**old["versions"], "torch": "1.0"}}))
    assert machine.stored(CPU) is None
    machine.store(replace(ceilings, copy_bytes_per_s=0.0, read_bytes_per_s=0.0), CPU)
    assert machine.stored(CPU) is None


def test_what_an_older_version_kept_is_measured_again(ceilings: Ceilings) -> None:
    path = machine.ceilings_path(CPU)
    old = json.loads(path.read_text())
    del old["read_bytes_per_s"]
    path.write_text(json.dumps(old))
    assert machine.stored(CPU) is None


def test_a_lower_rate_does_not_replace_a_higher_one(ceilings: Ceilings) -> None:
    now = replace(
        ceilings,
        copy_bytes_per_s=12e9,
        read_bytes_per_s=1e9,
        matmul_flop_per_s={"bfloat16": 100e9, "float16": 60e9, "float32": 100e9},
        measured_ns=7,
    )
    kept = machine.highest(now, ceilings)
    assert (kept.copy_bytes_per_s, kept.read_bytes_per_s) == (12e9, 8e9)
    assert kept.matmul_flop_per_s == {"bfloat16": 200e9, "float16": 60e9, "float32": 100e9}
    assert kept.measured_ns == 7
    assert machine.highest(now, None) == now


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-5, "just now"), (59, "just now"), (60, "1 minute ago"), (3_599, "59 minutes ago"),
        (3_600, "1 hour ago"), (86_399, "23 hours ago"), (86_400, "1 day ago"),
        (3 * 86_400 + 5, "3 days ago"),
    ],
)  # fmt: skip
def test_how_long_ago(seconds: int, said: str) -> None:
    assert machine.ago(10**18, 10**18 + seconds * 10**9) == said


def test_now_is_just_now() -> None:
    assert machine.ago(time.time_ns()) == "just now"


def test_a_cache_that_cannot_be_written(
    cache: Path, ceilings: Ceilings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = machine.ceilings_path(CPU)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file")
    monkeypatch.setattr(machine, "measure", lambda _: ceilings)
    found, where = machine.ceilings_of(CPU)
    assert found == ceilings
    assert where.startswith("measured now; not stored (")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_LENS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert machine.cache_folder() == Path("/x/moe_lens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert machine.cache_folder() == Path.home() / ".cache" / "moe_lens"
    assert machine.slug("Intel(R) Xeon(R) 2.1 GHz") == "Intel-R-Xeon-R-2.1-GHz"
    assert machine.slug("///") == "device"

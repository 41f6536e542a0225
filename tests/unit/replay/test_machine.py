"""Ceilings are kept per device, and used only where they are of it."""

from __future__ import annotations

import json
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
    assert where.startswith("stored")


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
    machine.store(replace(ceilings, copy_bytes_per_s=0.0), CPU)
    assert machine.stored(CPU) is None


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

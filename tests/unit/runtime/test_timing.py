"""Timing: taking turns, CPU time, and what counts as noise; ceilings and the machine in words."""

from __future__ import annotations

import subprocess
import time
from dataclasses import asdict

import pytest
import torch

from moe_lens.runtime import ceilings, timing


def test_works_take_turns_and_change_who_begins(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    order = []

    def work(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds

        return run

    works = {"a": work("a", 1.0), "b": work("b", 2.0), "a again": work("a again", 1.0)}
    found = timing.interleaved(works, 3, "cpu")
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3, "a again": [1.0] * 3}
    turn = ["a", "b", "a again"]
    warm_up = [name for name in turn for _ in range(2)]
    assert order == warm_up + turn + turn[::-1] + turn


def test_what_sleeps_takes_no_time():
    (slept,) = timing.interleaved({"sleep": lambda: time.sleep(0.02)}, 1, "cpu")["sleep"]
    assert slept < 0.01


def test_a_short_work_is_repeated_within_a_measurement():
    calls = []
    found = timing.interleaved({"short": lambda: calls.append(1)}, 2, "cpu")["short"]
    assert len(calls) > 20
    assert max(found) < timing.SHORTEST_S


def test_a_ratio_is_taken_within_rounds():
    first, second = [1.0, 10.0, 1.0], [2.0, 20.0, 3.0]
    assert timing.ratio(first, second) == 2.0


def test_noise_is_what_equals_differ_by():
    assert timing.noise_floor([1.0] * 9, [1.0] * 9) == 0
    assert timing.noise_floor([1.0] * 9, [1.03] * 9) == pytest.approx(0.03)
    # Ratios 0.9, 1, 1.1: no bias, a spread of 0.1.
    floor = timing.noise_floor([1.0] * 3, [0.9, 1.0, 1.1])
    assert floor == pytest.approx(1.96 * 1.2533 * 1.4826 * 0.1 / 3**0.5, rel=1e-4)
    assert timing.noise_floor([1.0] * 48, [0.9, 1.0, 1.1] * 16) == pytest.approx(floor / 4)


def test_a_difference_below_the_noise_is_not_shown():
    assert not timing.shows(1.019, 0.02)
    assert not timing.shows(0.981, 0.02)
    assert timing.shows(1.03, 0.02)
    assert timing.shows(0.97, 0.02)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(ceilings, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(ceilings, "REPEATS", 2)
    monkeypatch.setattr(ceilings, "PAUSE_S", {})
    monkeypatch.setattr(ceilings, "WIDTH", 64)


def test_a_machine_is_measured_and_described(small):
    before = time.time_ns()
    found = ceilings.measure("cpu")
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert 1e8 < found.read_bytes_per_s < 1e13
    assert found.bytes_per_s == max(found.copy_bytes_per_s, found.read_bytes_per_s)
    assert set(found.matmul_flop_per_s) == {"bfloat16", "float16", "float32"}
    assert all(1e6 < rate < 1e15 for rate in found.matmul_flop_per_s.values())
    assert found.device == "cpu"
    assert found.device_name
    assert found.cores >= 1
    assert found.threads == torch.get_num_threads()
    assert found.versions["torch"] == torch.__version__
    assert (found.driver, found.clocks_mhz) == ("", {})
    assert before <= found.measured_ns <= time.time_ns()
    assert set(asdict(found)) >= {"copy_bytes_per_s", "driver", "versions"}


def test_bytes_and_operations_are_counted(small, monkeypatch):
    tries, pauses = iter([0.7, 0.5, 0.9, 0.6]), []

    def in_half_a_second(works, repeats, device, **_):
        best = next(tries)
        taken = {name: [best, best + 0.1] for name in works}
        return taken | {"vector": [2 * best]}

    monkeypatch.setattr(ceilings, "interleaved", in_half_a_second)
    monkeypatch.setattr(ceilings, "_side", lambda dtype, _: 32 if dtype is torch.float16 else 64)
    monkeypatch.setattr(ceilings, "PAUSE_S", {"cpu": 7.0})
    monkeypatch.setattr(time, "sleep", pauses.append)
    found = ceilings.measure("cpu")
    assert found.copy_bytes_per_s == 2 * 2**20 / 0.5  # read and written
    assert found.read_bytes_per_s == 2**20 / 0.5  # the quicker of the two that read
    assert found.matmul_flop_per_s["float32"] == 2 * 64**3 / 0.5
    assert found.matmul_flop_per_s["float16"] == 2 * 32**3 / 0.5
    assert pauses == [7.0] * 3


def test_a_dtype_without_a_quick_path_gets_a_small_product(monkeypatch):
    operations = 2 * ceilings.PLAIN_MATRIX**3
    for flop_per_s, size in ((1e9, ceilings.PLAIN_MATRIX), (100e9, ceilings.MATRIX["cpu"])):
        seconds = operations / flop_per_s
        monkeypatch.setattr(
            ceilings, "interleaved", lambda *_, s=seconds: {"product": [9.0, s, s * 1.1]}
        )
        assert ceilings._side(torch.float16, torch.device("cpu")) == size
    assert ceilings._side(torch.float16, torch.device("cuda")) == ceilings.MATRIX["cuda"]


def test_what_moves_memory_moves_as_much_as_is_counted(small):
    made = ceilings._moves(2**18, torch.device("cpu"))
    assert {name: work().numel() for name, work in made.items()} == {
        "copy": 2**18 // 8,
        "sum": 1,
        "vector": 2**18 // (2 * 64),
    }


def test_clocks_are_read_while_the_device_works(smi, monkeypatch):
    asked, done = smi("580.95.05, 1500, 3201, 1980\n"), []
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: seen.append((len(done), len(asked))))
    found = ceilings._under_load(lambda: done.append(1), 0.3, torch.device("cuda"))
    assert found == ("580.95.05", {"sm": 1500.0, "memory": 3201.0, "sm_max": 1980.0})
    assert seen == [(7, 1)]  # 2 s of work, then nvidia-smi, and only then the wait
    assert ceilings._under_load(lambda: done.append(1), 0.3, torch.device("cpu")) == ("", {})
    assert len(done) == 7


@pytest.fixture
def smi(monkeypatch):
    """Pretends that nvidia-smi prints this; returns the commands it was asked."""
    asked = []

    def pretend(printed):
        def run(command, **_):
            asked.append(command)
            if isinstance(printed, Exception):
                raise printed
            return subprocess.CompletedProcess(command, 0, stdout=printed)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: type("P", (), {"uuid": "1b2c"})
        )
        return asked

    return pretend


def test_driver_and_clocks_come_from_nvidia_smi(smi):
    asked = smi("580.95.05, 1980, 3201, [N/A]\n")
    driver, clocks = ceilings._nvidia_smi(torch.device("cuda"))
    assert driver == "580.95.05"
    assert clocks == {"sm": 1980.0, "memory": 3201.0}
    assert asked[0][-2:] == ["-i", "GPU-1b2c"]


@pytest.mark.parametrize("trouble", [FileNotFoundError(), subprocess.TimeoutExpired("x", 10)])
def test_without_nvidia_smi_there_are_none(smi, trouble):
    smi(trouble)
    assert ceilings._nvidia_smi(torch.device("cuda")) == ("", {})

"""What `moe-lens demo` does around the training: its folder, its options, its table."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from moe_lens.commands.demo import demo, make_way, print_bits, progress_bar
from moe_lens.demo.train import Progress
from moe_lens.errors import CommandError, TraceLocked
from moe_lens.trace.lock import RankLock


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "meta").mkdir(parents=True)
    (run / "meta" / "rank=0.json").write_text("{}")
    return run


@pytest.mark.parametrize("force", [False, True])
def test_a_new_or_empty_folder_is_fine(tmp_path: Path, force: bool) -> None:
    make_way(tmp_path / "new", force)
    make_way(tmp_path, force)
    assert tmp_path.is_dir()


def test_a_trace_is_replaced_only_by_force(trace: Path) -> None:
    with pytest.raises(CommandError, match="holds a trace already: replace it with --force"):
        make_way(trace, force=False)
    assert trace.exists()
    make_way(trace, force=True)
    assert not trace.exists()


def test_what_is_no_trace_is_never_removed(tmp_path: Path, trace: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(trace)
    for out in (tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(CommandError, match="exists and is not a trace"):
            make_way(out, force=True)
    assert (trace / "meta" / "rank=0.json").exists()


def test_a_trace_that_is_being_written_is_not_removed(trace: Path) -> None:
    lock = RankLock(trace, 0)
    with pytest.raises(TraceLocked):
        make_way(trace, force=True)
    lock.release()
    assert trace.exists()


def test_options_that_contradict_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--steps and --minutes exclude each other"):
        demo(out=tmp_path / "run", steps=3, minutes=1.0)
    with pytest.raises(CommandError, match="--minutes must be above 0, got -1"):
        demo(out=tmp_path / "run", steps=None, minutes=-1.0)
    assert not (tmp_path / "run").exists()


def test_the_table_has_a_row_for_each_domain() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        print_bits(console, {"MoE": {"prose": 2.25}, "order 2": {"prose": 3.1719}})
    rows = [line for line in shown.get().splitlines() if "prose" in line]
    assert len(rows) == 1
    assert "2.250" in rows[0]
    assert "3.172" in rows[0]


def test_the_bar_shows_loss_speed_imbalance_and_drops() -> None:
    console = Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as shown, progress_bar(console) as on_step:
        on_step(
            Progress(
                step=7,
                done=1.0,
                bits_per_byte=3.456,
                tokens_per_second=9_700.4,
                load_max_over_mean=2.34,
                dropped_share=0.0512,
            )
        )
    for text in ("7 ", "3.46 bits/byte", "9,700 tok/s", "max load 2.3×", "5.1% dropped"):
        assert text in shown.get()

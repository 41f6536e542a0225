"""`moe-lens record`: run any script, and record the MoE models that appear in it."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.errors import CommandError

if TYPE_CHECKING:
    from moe_lens_hooks.autorecord import Watcher
    from moe_lens_hooks.autosteps import Recording


class Weights(StrEnum):
    """How gate weights are stored."""

    bf16 = "bf16"
    exact = "exact"


def record(
    script: Annotated[str, typer.Argument(help="What to run.", metavar="SCRIPT")],
    args: Annotated[
        list[str] | None, typer.Argument(help="Its own arguments and options.", metavar="ARGS")
    ] = None,
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is the name of a module, as after python -m.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the traces, one per model; default: traces/SCRIPT-TIME.", metavar="DIR"
        ),
    ] = None,
    tokens: Annotated[
        float,
        typer.Option(help="Share of sequences whose every routing decision is kept.", min=0, max=1),
    ] = 0.01,
    weights: Annotated[Weights, typer.Option(help="How gate weights are stored.")] = Weights.bf16,
    logits: Annotated[
        bool, typer.Option("--logits", help="Keep the router logits of those sequences too.")
    ] = False,
    token_ids: Annotated[
        bool,
        typer.Option(
            "--token-ids", help="Keep their vocabulary ids too (they spell out the text)."
        ),
    ] = False,
    max_bytes: Annotated[
        int | None, typer.Option(help="Bound on the disk per model and process.", min=1)
    ] = None,
) -> None:
    """Run a script as python would, and record the MoE models that appear in it.

    Each model that routes gets a trace of its own in DIR from its first forward on. The script is
    not changed, and what it prints, returns and raises is its own; what moe-lens has to say goes to
    stderr. Options of moe-lens stand before SCRIPT.

    \b
    Examples:
      moe-lens record train.py --epochs 3
      moe-lens record --out traces/eval --tokens 0.1 -m my_package.evaluate --limit 100
      torchrun --nproc-per-node 2 -m moe_lens record --out traces/ddp train.py
    """  # noqa: D301  (\b keeps the lines as they are)
    from moe_lens.commands.script import run_script, when_imported

    _check_script(script, module)
    session = _Session(_folder(out, script))
    options = {
        "tokens": tokens,
        "weights": weights.value,
        "logits": logits,
        "token_ids": token_ids,
        "max_bytes": max_bytes,
        "on_breach": "warn",
        "on_write_error": "warn",
    }
    # At exit, since threads that the script left running still count; before what torch registers.
    atexit.register(session.leave)
    when_imported("torch", lambda: session.begin(options))
    session.error = run_script([script, *(args or [])], module=module, hidden=session.files)
    if isinstance(session.error, SystemExit):
        raise session.error
    if session.error is not None:
        session.end()
        raise SystemExit(1)


class _Session:
    """One run of a script: what is recorded, and what is said about it."""

    def __init__(self, folder: Path) -> None:
        self.error: BaseException | None = None
        """What ended the script, if not its last line."""
        self.files: set[str] = {__file__}
        """Files whose frames are not the script's."""
        self._folder = folder
        self._watcher: Watcher | None = None
        self._process = os.getpid()
        self._ended = False

    def begin(self, options: dict[str, Any]) -> None:
        """Torch is there now: watch which modules are called."""
        from moe_lens_hooks import autorecord

        self.files.add(autorecord.__file__)
        self._watcher = autorecord.Watcher(self._folder, _say, **options)
        self._watcher.watch()

    def leave(self) -> None:
        """The interpreter ends."""
        if os.getpid() != self._process:  # a fork that ends the ordinary way has nothing to close
            return
        self.end()
        if isinstance(self.error, KeyboardInterrupt):  # as Python does with it, for who waits
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def end(self) -> None:
        """Close the traces, and say where they are."""
        if self._ended:
            return
        self._ended = True
        recordings: list[Recording] = []
        if self._watcher is not None:
            fine = isinstance(self.error, SystemExit) and self.error.code in (None, 0)
            self._watcher.finish(None if fine else self.error)
            recordings = self._watcher.recordings
        for recording in recordings:
            if recording.rank == 0:
                _say(_summary(recording))
        if not recordings:
            _say(_nothing(self._watcher))


def _say(text: str) -> None:
    """One line to the user; standard output is the script's."""
    sys.stderr.write(f"moe-lens: {text}\n")
    sys.stderr.flush()


def _check_script(script: str, module: bool) -> None:
    if not module and not Path(script).is_file():
        raise CommandError(f"{script} is not a file. For the name of a module, put -m before it.")


def _folder(out: Path | None, script: str) -> Path:
    """Where the traces go.

    Raises:
        CommandError: Something is there, or the processes of a launch would not agree on a name.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    if out is None:
        if world > 1:
            raise CommandError("name a folder with --out: all processes write into one.")
        return Path("traces") / f"{Path(script).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    # Other processes of this launch may have begun; what this rank wrote is of an earlier one.
    taken = out.is_file() or (
        out.is_dir() and any(out.iterdir())
        if world == 1
        else any(out.glob(f"*/meta/rank={rank}.json"))
    )
    if taken:
        raise CommandError(f"{out} is not empty: name another folder with --out, or remove it.")
    return out


def _summary(recording: Recording) -> str:
    """Where a trace is, what is in it, and how to look at it."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from moe_lens.numbers import counted
    from moe_lens.trace.layout import segments

    files = segments(recording.path, "steps", recording.rank).values()
    parts = [pq.read_table(f, columns=["step", "tokens", "breaches"]) for f in files]
    steps = len(set().union(*(t["step"].to_pylist() for t in parts)))
    tokens = sum(pc.sum(t["tokens"]).as_py() for t in parts)
    breaches = sum(pc.sum(t["breaches"]).as_py() for t in parts)
    whose = f"rank 0 of {recording.world}: " if recording.world > 1 else ""
    wrong = f", {breaches} breaches (moe-lens info says which)" if breaches else ""
    return (
        f"{whose}{counted(steps, 'step')}, {counted(tokens, 'token')}{wrong} in {recording.path}; "
        f"next: moe-lens report {recording.path}"
    )


def _nothing(watcher: Watcher | None) -> str:
    """Why there is no trace, and what to do."""
    if watcher is None:
        return "nothing was recorded: the script did not import torch."
    if watcher.refused:
        return "nothing was recorded (see above); docs/hooks.md shows how to write an adapter."
    return (
        "nothing was recorded: no module with MoE layers was called in this process. If one "
        "routes, write an adapter (docs/hooks.md). If it runs in processes that the script starts, "
        "or only inside a compiled function, put moe_lens.record into the code that runs there."
    )

"""Start this command once for each rank on this machine, as torchrun does, and end as it ends."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence

from moe_lens.errors import ReplayError


def started() -> bool:
    """Whether torchrun, or `launch`, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `moe-lens ARGUMENTS` in so many processes, and wait for them.

    `python -m torch.distributed.run --standalone`, without its report of what failed, which has
    dozens of lines: the process that failed has said what was wrong.

    Args:
        processes: How many.
        arguments: After `moe-lens`.

    Returns:
        The exit code: 0, or that of the process that failed first.

    Raises:
        ReplayError: One of them was killed.
        KeyboardInterrupt: On Ctrl-C.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or torchrun says that it does so
    # A rank says in a line that another is gone; its libraries would warn of it before.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    argv = ["--standalone", f"--nproc-per-node={processes}", "--max-restarts=0"]
    try:
        with _quiet():
            run.main([*argv, "-m", "moe_lens", *_without_nproc(arguments)])
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode < 0:
            raise ReplayError(
                f"rank {rank} was killed (signal {-failure.exitcode}), and the others were ended."
            ) from None
        return int(failure.exitcode)
    except SignalException:
        raise KeyboardInterrupt from None
    return 0


def _without_nproc(arguments: Sequence[str]) -> list[str]:
    """The launcher would take it for an abbreviation of its own."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--nproc":
            next(words, None)
        elif not word.startswith("--nproc="):
            kept.append(word)
    return kept


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the launcher's log of its children's end."""
    logger = logging.getLogger("torch.distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)

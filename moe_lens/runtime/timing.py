"""How long something takes on a device: repeats that take turns, and the noise between equals.

On a CPU the time is the process's CPU time, all its threads, since cores are shared and wall time
says more of the neighbours. On a CUDA device every work is captured in a graph, runs with a cold L2
cache, and is timed by events around the graph.

Absolute times of two runs are not comparable, works of one run are: time what is to be compared in
one call. A work that is passed twice, under two names, gives the noise.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime import ops

Work = Callable[[], object]

SHORTEST_S = 1e-3
"""On a CPU a work is repeated within a measurement until it takes as long as this."""

HEAD_START_CYCLES = 200_000
"""A CUDA device idles as long before each measurement, about 0.1 ms, so that the host has enqueued
everything when the first event passes and no launch is timed."""


def interleaved(
    works: Mapping[str, Work],
    repeats: int,
    device: torch.device | str,
    *,
    cold: bool = True,
    graphs: bool = True,
) -> dict[str, list[float]]:
    """Seconds that each work took, in turns: A B C, C B A, A B C and so on.

    Args:
        works: What to time, by name. On a CUDA device it runs on the current stream, and with
            `graphs` must neither wait for the device nor allocate what outlives it.
        repeats: Measurements of each work.
        device: Where the works run.
        cold: On a CUDA device, empty the L2 cache before each measurement.
        graphs: On a CUDA device, time a captured graph and not the launches.

    Returns:
        For each work its `repeats` times, those of one round at the same place.

    Raises:
        RuntimeInputError: A work cannot be captured.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            measures = {n: _on_cuda(n, w, device, cold, graphs) for n, w in works.items()}
            taken = _in_turns(measures, repeats)
            torch.cuda.synchronize(device)
        return {name: [read() for read in reads] for name, reads in taken.items()}
    taken = _in_turns({name: _on_cpu(work) for name, work in works.items()}, repeats)
    return {name: [read() for read in reads] for name, reads in taken.items()}


Read = Callable[[], float]
"""Gives the seconds of a measurement once the device is done."""


def _in_turns(measures: Mapping[str, Callable[[], Read]], repeats: int) -> dict[str, list[Read]]:
    taken: dict[str, list[Read]] = {name: [] for name in measures}
    gc.collect()
    for i in range(repeats):
        turns = list(measures.items())
        for name, measure in turns if i % 2 == 0 else reversed(turns):
            taken[name].append(measure())
    return taken


def _on_cpu(work: Work) -> Callable[[], Read]:
    work()  # warm-up: caches fill, memory is taken
    before = time.process_time()
    work()
    once = max(time.process_time() - before, 1e-7)
    inner = max(1, math.ceil(SHORTEST_S / once))

    def measure() -> Read:
        before = time.process_time()
        for _ in range(inner):
            work()
        seconds = (time.process_time() - before) / inner
        return lambda: seconds

    return measure


def _on_cuda(
    name: str, work: Work, device: torch.device, cold: bool, graphs: bool
) -> Callable[[], Read]:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles, loads, and takes memory: none of it in a graph
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    run: Work = _captured(name, work, device) if graphs else work
    return lambda: _measure(run, device, cold)


def _captured(name: str, work: Work, device: torch.device) -> Work:
    """A replay of the work as a CUDA graph."""
    stream = torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        _without_waiting(work)
        with torch.cuda.graph(graph):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # torch.cuda.graph leaves its own behind when it fails
        raise RuntimeInputError(
            f"{name} cannot be captured in a CUDA graph (does it wait for the device?): "
            f"{str(error).splitlines()[0]}; time it with graphs=False"
        ) from error
    graph.replay()  # the first launch of a graph brings it to the device
    torch.cuda.synchronize(device)
    return graph.replay


def _without_waiting(work: Work) -> None:
    """Run a work, and raise where it waits for the device.

    Found out before a capture: one that fails leaves torch up to 2.11 believing that it goes on.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the mode being a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _measure(run: Work, device: torch.device, cold: bool) -> Read:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
    if cold:
        ops.flush_l2(device)
    begin.record()
    run()
    end.record()
    return lambda: begin.elapsed_time(end) / 1e3


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Second over first: the median over the rounds, in which both had the same neighbours."""
    return statistics.median(b / a for a, b in zip(first, second, strict=True))


def noise_floor(first: Sequence[float], second: Sequence[float]) -> float:
    """The relative difference that two timings of one and the same work show.

    The larger of what their median ratio is off by, and 1.96 standard errors of that median, the
    spread being 1.4826 times the median absolute deviation of the rounds' ratios (robust against
    the odd round that a neighbour slowed) and a median's error 1.2533 of a mean's.

    Args:
        first: Seconds of a work, by round.
        second: Of the same work, timed in the same call under another name.

    Returns:
        A fraction: with 0.02, a work that is 1.5 % slower than another has not been shown to be.
    """
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    median = statistics.median(ratios)
    spread = 1.4826 * statistics.median(abs(r - median) for r in ratios)
    return max(abs(median - 1), 1.96 * 1.2533 * spread / math.sqrt(len(ratios)))


def shows(difference: float, floor: float) -> bool:
    """Whether a ratio differs from 1 by more than noise: below the floor, print no difference."""
    return abs(difference - 1) > floor

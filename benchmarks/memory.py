"""Whether the writer's memory stays flat over 10 million token-layers.

Realistic routing (48 layers x 128 experts x top-8, 4,096 tokens a forward, every token's row) goes
through the trace writer, which seals about seven segments of 1.5 million rows. The resident memory
of the process is sampled every few milliseconds. Gate: the peak over the last third of the rows is
at most 5 % above the peak over the first third, which begins after the first sealed segment.

    python benchmarks/memory.py [--quick]

A few forwards are generated and written again and again under new step numbers, so that what is
measured is the writer and not the generator.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import psutil
from _common import Report, is_quick, progress, scratch, table
from routing_generator import RoutingGenerator, Shape

from moe_lens.trace import layout
from moe_lens.trace.events import Forward
from moe_lens.trace.meta import Attempt, Meta
from moe_lens.trace.store import SEAL_ROWS
from moe_lens.trace.writer import TraceWriter


class Sampler:
    """Resident memory of this process, with how many forwards had been written by then."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, int]] = []
        self.written = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.wait(0.003):
            self.samples.append((self.written, self._process.memory_info().rss))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def peak(self, start: int, end: int) -> int:
        """Bytes, while the forwards `start` to `end` were written."""
        return max(rss for written, rss in self.samples if start <= written < end)


def again(forward: Forward, step: int) -> Forward:
    """The same routing as another step. The writer lets go of rows it has written, hence copies."""
    layers = [replace(x) for x in forward.layers]
    return replace(forward, step=step, layers=layers, tokens=list(forward.tokens))


def main() -> int:
    quick = is_quick(__doc__)
    shape = Shape(positions=64) if quick else Shape()
    wanted = 6_000_000 if quick else 10_000_000
    pool = list(RoutingGenerator(shape).forwards(4))
    per_forward = shape.tokens * shape.layers
    warm_up = 1 + SEAL_ROWS // per_forward  # forwards until the first segment is sealed
    n = -(-wanted // per_forward)
    report = Report("memory", shape.described() | {"token_layers": n * per_forward}, ("psutil",))
    with scratch() as run:
        writer = TraceWriter(run, Meta("memory", attempts=[Attempt(0, 0)]))
        sampler = Sampler()
        for step in range(warm_up + n):
            writer.put(again(pool[step % len(pool)], step))
            while writer.waiting:  # one forward at a time: the queue is bounded, and not asked here
                time.sleep(0.002)
            sampler.written = step + 1
            progress(f"forward {step + 1} of {warm_up + n}")
        writer.flush()
        segments = len(layout.segments(run, "routing", 0))
        sampler.stop()
        writer.close()
        if writer.lost_rows or writer.breach_count:
            raise SystemExit(f"lost {writer.lost_rows} rows, breaches: {writer.take_breaches()}")
    third = n // 3
    bounds = [warm_up + third * i for i in range(3)] + [warm_up + n]
    peaks = [sampler.peak(a, b) for a, b in pairwise(bounds)]
    table(
        ["forwards", "token-layers", "peak resident"],
        [
            [f"{a} to {b}", f"{(b - a) * per_forward / 1e6:.1f} M", f"{p / 2**20:.0f} MiB"]
            for (a, b), p in zip(pairwise(bounds), peaks, strict=True)
        ],
    )
    growth = peaks[-1] / peaks[0] - 1
    print(f"segments sealed: {segments}")
    report.numbers = {
        "peak_bytes_by_third": peaks,
        "growth": growth,
        "segments_sealed": segments,
        "samples": len(sampler.samples),
    }
    report.gate("growth of the peak, last third over first", growth, at_most=0.05)
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())

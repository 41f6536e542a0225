"""How works are timed: in turns, in an order that is shuffled anew each round, under CUDA graphs.

A work that makes the host wait for the device cannot be in a graph; it takes its turns too, but is
timed with its launches. On a CPU all times are CPU times of the process.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_lens.errors import MoeLensError, RuntimeInputError
from moe_lens.runtime import ops
from moe_lens.runtime.timing import interleaved

Work = Callable[[], Any]
INSIDE = 4
"""How often a stage is repeated inside one graph."""


class Timing:
    """What this device is timed with.

    Args:
        device: "cuda" or "cpu".
        quick: Fewer rounds.
        seed: Of the order.
    """

    def __init__(self, device: str, *, quick: bool, seed: int) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.rounds, self.repeats = (2, 5) if quick else (4, 10)
        if not self.cuda:
            self.rounds, self.repeats = 1, 2
        self.random = random.Random(seed)
        self.cold, self.why_warm = _flush(self.device)

    def waits(self, work: Work) -> str:
        """Why the work cannot be captured in a graph; "" if nothing shows.

        Asked of torch before it is tried: a capture that fails leaves the allocator in a state that
        what follows would suffer from.
        """
        if not self.cuda:
            return ""
        work()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        except RuntimeError as e:
            return str(e).splitlines()[0][:200]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        return ""

    def race(
        self, works: Mapping[str, Work], launched: Mapping[str, Work]
    ) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]:
        """Seconds of each work in a graph, and with launches; and who failed, with the reason.

        Args:
            works: To be timed in graphs.
            launched: To be timed without.
        """
        works, launched = dict(works), dict(launched)
        in_graphs: dict[str, list[float]] = {name: [] for name in works}
        outside: dict[str, list[float]] = {name: [] for name in launched}
        failed: dict[str, str] = {}
        for _ in range(self.rounds):
            for given, taken, graphs in ((works, in_graphs, True), (launched, outside, False)):
                found = self._round(given, graphs, failed)
                for name, seconds in found.items():
                    taken[name] += seconds
        kept = {name: s for name, s in in_graphs.items() if name in works}
        return kept, {name: s for name, s in outside.items() if name in launched}, failed

    def _round(
        self, works: dict[str, Work], graphs: bool, failed: dict[str, str]
    ) -> dict[str, list[float]]:
        """One round; who cannot be captured leaves the race."""
        repeats = self.repeats if graphs or not self.cuda else max(3, self.repeats // 2)
        while works:
            names = list(works)
            self.random.shuffle(names)
            shuffled = {name: works[name] for name in names}
            try:
                return interleaved(shuffled, repeats, self.device, cold=self.cold, graphs=graphs)
            except RuntimeInputError as e:
                culprit = next((n for n in names if str(e).startswith(f"{n} cannot")), None)
                if culprit is None:
                    raise
                failed[culprit] = str(e).splitlines()[0][:300]
                del works[culprit]
        return {}

    def stages(self, parts: Mapping[str, Work]) -> dict[str, dict[str, float]]:
        """Microseconds of each stage.

        On a GPU three figures: `in_graph`, what the stage adds to a graph when its data is not in
        the cache (a graph of several flushes and stages, less one of the flushes alone); `warm`,
        the same without flushes; `alone`, a graph of the stage only, its start included.
        """
        if not self.cuda:
            found = interleaved(parts, self.repeats, self.device)
            return {n: {"in_graph": 1e6 * statistics.median(s)} for n, s in found.items()}

        def flushed(part: Work | None) -> Work:
            def run() -> None:
                for _ in range(INSIDE):
                    ops.flush_l2(self.device)
                    if part is not None:
                        part()

            return run

        def often(part: Work) -> Work:
            def run() -> None:
                for _ in range(1 + INSIDE):
                    part()

            return run

        works: dict[str, Work] = {"flush": flushed(None)}
        for name, part in parts.items():
            works[f"{name}/cold"] = flushed(part)
            works[f"{name}/often"] = often(part)
            works[f"{name}/alone"] = part
            works[f"{name}/once"] = part  # with what it needs in the cache, as in `often`
        hot = {n: w for n, w in works.items() if n.endswith(("/often", "/once"))}
        cold = {n: w for n, w in works.items() if n not in hot}
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(max(1, self.rounds // 2)):
            for given, is_cold in ((cold, True), (hot, False)):
                names = list(given)
                self.random.shuffle(names)
                shuffled = {name: given[name] for name in names}
                found = interleaved(shuffled, self.repeats, self.device, cold=is_cold)
                for name, seconds in found.items():
                    taken[name] += seconds
        us = {name: 1e6 * statistics.median(seconds) for name, seconds in taken.items()}
        return {
            name: {
                "in_graph": (us[f"{name}/cold"] - us["flush"]) / INSIDE,
                "warm": (us[f"{name}/often"] - us[f"{name}/once"]) / INSIDE,
                "alone": us[f"{name}/alone"],
            }
            for name in parts
        }


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in microseconds."""
    low, middle, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    return {
        "median_us": 1e6 * middle,
        "q25_us": 1e6 * low,
        "q75_us": 1e6 * high,
        "min_us": 1e6 * min(seconds),
        "times": len(seconds),
    }


def _flush(device: torch.device) -> tuple[bool, str]:
    """Whether the cache can be emptied between works, and why not."""
    try:
        ops.flush_l2(device)
    except MoeLensError as e:
        return False, str(e).splitlines()[0]
    return True, ""

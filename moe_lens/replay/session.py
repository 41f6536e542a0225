"""A whole replay: what there is, what it needs, the measuring, and the file at its end."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_lens.errors import ReplayError
from moe_lens.replay import floors, machine, results, summary
from moe_lens.replay.choose import Chosen, choose
from moe_lens.replay.curve import Curve, Ledger, measure_curve
from moe_lens.replay.floors import Ceiling, Shape
from moe_lens.replay.index import Index, index_of
from moe_lens.replay.measure import Row, call, in_graphs, measured, rows_by_expert
from moe_lens.replay.policies import Work, apply
from moe_lens.replay.routing import Routed, read
from moe_lens.replay.settings import Settings, check_memory, device_of, dtype_of, shape_of
from moe_lens.runtime.ceilings import device_name, versions
from moe_lens.runtime.layer import MoELayer
from moe_lens.trace.reader import open_run

HOTTEST = 5
"""Experts of a layer that are named with the time attributed to them."""

_SAVE_EVERY_S = 5.0
"""What was measured since is lost when the process is killed; Ctrl-C loses nothing."""

_CURVE_SHARE = 0.15
"""Of the seconds that are given, what curves may take."""


@dataclass
class Progress:
    """How far a replay is: forwards done, of how many, and what runs now."""

    done: int
    of: int
    now: str


@dataclass
class Replayed:
    """What a replay measured.

    Attributes:
        rows: Rows of `moe_lens.trace.schema.REPLAY`.
        about: What the file's metadata says: machine, policy, shapes, what was left out.
        path: The file that was written.
    """

    rows: list[Row]
    about: dict[str, Any]
    path: Path

    @property
    def interrupted(self) -> bool:
        return bool(self.about.get("state") == "interrupted")

    def by_layer(self) -> list[summary.Summary]:
        """A row for each phase and layer."""
        return summary.by_layer(self.rows)

    def answers(self) -> list[str]:
        """What this routing costs beside a balanced one: a sentence for each phase."""
        return summary.answers(self.rows)


def replay(
    run: str | Path,
    settings: Settings | None = None,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Replayed:
    """Run a trace's routing through a real MoE layer with random weights, and time it.

    Args:
        run: Folder of the trace.
        settings: What to replay, and how.
        name: Of the result, `RUN/replay/<name>.parquet`; None: as `results.name_of` says.
        out: Another file to write in its place; not together with `name`.
        on_progress: Called when a layer of a forward is done.

    Returns:
        What was measured. After Ctrl-C, that so far, marked as interrupted.

    Raises:
        TraceError: Not a trace.
        ReplayError: Nothing to replay, no sizes, no room, no place to write; said before any work.
        RuntimeInputError: The layer cannot run this.
        KeyboardInterrupt: Before anything was measured.
    """
    settings = settings or Settings()
    if name is not None and out is not None:
        raise ReplayError(
            f"--name {name} and --out {out} both say where the result is to lie: give one of them."
        )
    begun = time.monotonic()
    files = open_run(run)
    index = index_of(files, layers=settings.layers, phase=settings.phase, steps=settings.steps)
    _check_top_k(index, settings)
    chosen = choose(index, settings.forwards, partial=settings.partial)
    device = device_of(settings)
    with machine.one_thread(device):
        work = _Session(index, chosen, settings, device, begun, on_progress)
        path = Path(out) if out is not None else None
        if path is None:
            if name is None:
                shapes = list(work.shapes.values())
                name = results.name_of(settings, shapes, work.device_name)
            path = results.result_path(files.path, name)
        return work.run(results.Output(path))


def _check_top_k(index: Index, settings: Settings) -> None:
    top_k = settings.policy.top_k
    recorded = max((info.top_k or info.experts) for info in index.infos.values())
    if top_k is not None and not 1 <= top_k <= recorded:
        raise ReplayError(
            f"--top-k {top_k}: the trace has {recorded} choices a token, of which 1 to {recorded} "
            "can be kept."
        )


@contextmanager
def short_collections() -> Iterator[None]:
    """Garbage is collected before every timing: do not look through all of torch each time."""
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


class _Session:
    """One replay at work."""

    def __init__(
        self,
        index: Index,
        chosen: Chosen,
        settings: Settings,
        device: torch.device,
        begun: float,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.index, self.chosen, self.settings = index, chosen, settings
        self.device, self.begun, self.on_progress = device, begun, on_progress
        self.dtype = dtype_of(settings, device)
        self.device_name = device_name(device)
        self.shapes = {
            key: shape_of(info, settings, self.dtype) for key, info in index.infos.items()
        }
        self.tokens = max(f.tokens for f in chosen.forwards)
        slots = self._try_policy()
        for key, shape in self.shapes.items():
            top_k = index.infos[key].top_k or slots.get(key, 1)
            top_k = min(top_k, settings.policy.top_k or top_k)
            check_memory(shape, self.dtype, self.tokens, top_k, device)
        self.rows: list[Row] = []
        self.ledger = Ledger()
        self.curves: dict[tuple[Shape, str], Curve] = {}
        """By what runs them, since a batch of few slots may be run by another backend."""
        self.curve_s = 0.0
        """What a curve took within the current forward."""
        self.unweighted = 0
        self.backends: dict[str, str] = {}
        self.timed: set[str] = set()

    def _try_policy(self) -> dict[tuple[int, int], int]:
        """Refuse now what the policy would refuse at the first forward; slots of a token in it."""
        slots: dict[tuple[int, int], int] = {}
        layers = {number for _, number in self.index.infos}
        for found in read(self.index, layers, self.chosen.forwards[:1]):
            for routed in found:
                key = routed.rank, routed.layer
                work = apply(self.settings.policy, routed, self.index.infos[key])
                slots[key] = work.expert_ids_TK.shape[1]
        return slots

    def run(self, output: results.Output) -> Replayed:
        """Measure, and write what came of it."""
        self.on_progress(Progress(0, 1, "measuring the machine"))
        before = time.monotonic()
        self.ceilings, self.ceilings_from = machine.ceilings_of(self.device)
        self.begun += time.monotonic() - before  # once for all replays: not this one's time
        state = "complete"
        try:
            with short_collections():
                self._measure(output)
        except KeyboardInterrupt:
            if not self.rows:
                raise
            state = "interrupted"
        except BaseException:
            if self.rows:
                output.so_far(self.rows, self._about("interrupted"))
            raise
        about = self._about(state)
        if not self.rows:
            raise ReplayError(f"{self.index.files.path}: no forward that was chosen has a token.")
        if state == "complete":
            output.complete(self.rows, about)
        else:
            output.so_far(self.rows, about)
        path = output.path if state == "complete" else output.unfinished
        return Replayed(self.rows, about, path)

    def _measure(self, output: results.Output) -> None:
        by_shape: dict[Shape, set[tuple[int, int]]] = {}
        for key, shape in self.shapes.items():
            by_shape.setdefault(shape, set()).add(key)
        left = len(self.shapes)
        for shape, keys in by_shape.items():
            layer = self._layer(shape)  # one shape's weights at a time
            self._shape(keys, shape, layer, output, len(keys) / left)
            left -= len(keys)
            del layer

    def _shape(
        self,
        keys: set[tuple[int, int]],
        shape: Shape,
        layer: MoELayer,
        output: results.Output,
        share: float,
    ) -> None:
        """Measure the layers of one shape, forward by forward: all have the same forwards."""
        ranks = {rank for rank, _ in keys}
        forwards = [f for f in self.chosen.forwards if f.rank in ranks]
        must = len({f.phase for f in forwards})
        before = saved = time.monotonic()
        until, longest, began, pause = None, 0.0, False, _SAVE_EVERY_S
        if self.settings.seconds is not None:
            until = before + share * (self.begun + self.settings.seconds - before)
        for done, found in enumerate(read(self.index, {n for _, n in keys}, forwards)):
            if until is not None and done >= must and time.monotonic() + longest > until:
                return
            for routed in found:
                if (routed.rank, routed.layer) in keys and routed.tokens:
                    if until is not None and done < must and began and time.monotonic() > until:
                        return  # not even one forward of each phase fits: some layers have none
                    began = True
                    self._forward(routed, shape, layer)
                    now = f"{routed.phase}, layer {routed.layer}"
                    self.on_progress(Progress(done, len(forwards), now))
            now_s = time.monotonic()
            if done or self.device.type == "cpu":  # the first on a GPU compiles its kernels
                longest = max(longest, now_s - before - self.curve_s)
            before, self.curve_s = now_s, 0.0
            if now_s - saved > pause:
                output.so_far(self.rows, self._about("interrupted"))
                saved = time.monotonic()
                pause = max(_SAVE_EVERY_S, 20 * (saved - now_s))  # many rows take long to write
        self.on_progress(Progress(len(forwards), len(forwards), ""))

    def _forward(self, routed: Routed, shape: Shape, layer: MoELayer) -> None:
        """Measure one layer in one forward."""
        work = apply(self.settings.policy, routed, self.index.infos[routed.rank, routed.layer])
        x_TD = self._tokens(routed.tokens, shape)
        backend = layer.backend_for(work.expert_ids_TK.size)
        if self.settings.curve and (shape, backend.name) not in self.curves:
            before = time.monotonic()
            forced = layer.forced(backend.name)
            self.curves[shape, backend.name] = self._curve(shape, forced, x_TD, work)
            self.curve_s = time.monotonic() - before
        row = measured(
            layer,
            x_TD,
            routed,
            work,
            shape,
            self._ceiling(),
            repeats=self.settings.repeats,
            stages=self.settings.stages,
        )
        self.rows.append(row)
        self.unweighted += routed.unweighted
        self.backends[backend.name] = backend.why
        captured = in_graphs(layer, work.expert_ids_TK.size)
        self.timed.add("graphs" if captured else "launches (this backend waits for the device)")
        if self.settings.curve:
            rows_E = rows_by_expert(work.expert_ids_TK, shape.experts)
            took = row["time_ns"]
            curve = self.curves[shape, backend.name]
            self.ledger.add(routed.layer, routed.phase, rows_E, curve, took)

    def _finish(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _elapsed(self) -> float:
        return time.monotonic() - self.begun

    def _layer(self, shape: Shape) -> MoELayer:
        self.on_progress(Progress(0, 1, "making random weights"))
        return MoELayer.random(
            shape.experts,
            shape.hidden,
            shape.intermediate,
            dtype=self.dtype,
            device=self.device,
            seed=self.settings.seed,
            backend=self.settings.backend,
        )

    def _curve(self, shape: Shape, layer: MoELayer, x_TD: torch.Tensor, work: Work) -> Curve:
        """The curve of this shape's experts, measured beside a forward."""
        beside = call(layer, x_TD, work.expert_ids_TK, work.weights_TK)
        rows_E = rows_by_expert(work.expert_ids_TK, shape.experts)
        repeats, most = self.settings.repeats, self.tokens
        if self.settings.seconds is not None:
            beside()
            self._finish()
            before = time.monotonic()
            beside()
            self._finish()
            once = time.monotonic() - before
            spare = _CURVE_SHARE * (self.settings.seconds - self._elapsed())
            # In rounds: each repeat, and two to warm up. Points up to n have 2 n rows together.
            rounds = max(0.0, spare / (repeats + 2) - once)
            most = min(most, max(1, int(rounds / once * rows_E.sum() / 2)))
        self.on_progress(Progress(0, 1, "what one expert takes"))
        return measure_curve(layer, most, repeats, self.settings.seed, beside=beside, rows_E=rows_E)

    def _tokens(self, tokens: int, shape: Shape) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        x_TD = torch.randn(tokens, shape.hidden, device=self.device, generator=generator)
        return x_TD.to(self.dtype)

    def _missing(self) -> dict[str, list[int]]:
        """Layers of which no forward was measured, by phase."""
        layers = {n for _, n in self.shapes}
        found = {(row["phase"], row["layer"]) for row in self.rows}
        phases = sorted({f.phase for f in self.chosen.forwards})
        gone = {p: sorted(n for n in layers if (p, n) not in found) for p in phases}
        return {phase: missing for phase, missing in gone.items() if missing}

    def _about(self, state: str) -> dict[str, Any]:
        tokens = sum(row["tokens"] for row in self.rows)
        infos, preset = self.index.infos, self.settings.preset
        return {
            "state": state,
            "run": self.index.files.path.name,
            "run_id": self.index.files.meta.run_id,
            "model": self.index.files.meta.model,
            "imported": self.index.files.meta.imported,
            "made_steps": self.index.files.meta.steps,
            "policy": asdict(self.settings.policy),
            "weights": weights_from(self.unweighted, tokens),
            "renormalised": self._renormalised(),
            "expert_weights": "random",
            "preset": asdict(preset) if preset else None,
            "shapes": [
                {"rank": rank, "layer": n, **asdict(shape), "top_k": infos[rank, n].top_k}
                for (rank, n), shape in sorted(self.shapes.items())
            ],
            "device": str(self.device),
            "device_name": self.device_name,
            "clock": self._clock(),
            "ceilings": asdict(self.ceilings),
            "ceilings_from": self.ceilings_from,
            "beaten": summary.beaten(self.rows, self._ceiling()),
            "versions": versions(),
            "backends": self.backends,
            "repeats": self.settings.repeats,
            "tile": floors.TILE,
            "seconds": self._elapsed(),
            "forwards": {
                "in_trace": self.index.forwards,
                "with_rows": self.chosen.recorded,
                "partial": self.chosen.partial,
                "partial_used": self.chosen.used_partial,
                "chosen": len(self.chosen.forwards),
                "replayed": len({(r["rank"], r["step"], r["forward"]) for r in self.rows}),
            },
            "layers": {
                "chosen": len({n for _, n in infos}),
                "replayed": len({row["layer"] for row in self.rows}),
                "missing": self._missing(),
            },
            "padding_rows": self.index.padding,
            "curves": [
                {**asdict(shape), "backend": backend, **asdict(curve)}
                for (shape, backend), curve in self.curves.items()
            ],
            "attributed": [
                {
                    "layer": layer,
                    "phase": phase,
                    "experts": found.hottest(HOTTEST),
                }
                for (layer, phase), found in sorted(self.ledger.of.items())
            ],
        }

    def _ceiling(self) -> Ceiling:
        rate = self.ceilings.matmul_flop_per_s[str(self.dtype).removeprefix("torch.")]
        return Ceiling(self.ceilings.bytes_per_s, rate)

    def _clock(self) -> str:
        if self.device.type == "cpu":
            return "process CPU time, one thread"
        return f"CUDA events around {' and '.join(sorted(self.timed))}, cold L2"

    def _renormalised(self) -> bool | None:
        """Whether weights sum to one again after a smaller top-k; None: it was not asked for."""
        if self.settings.policy.top_k is None:
            return None
        return all(info.normalised is True for info in self.index.infos.values())


def weights_from(unweighted: int, tokens: int) -> str:
    """Where the gate weights come from, in words."""
    if not unweighted:
        return "recorded"
    if unweighted == tokens:
        return "1/k, none were recorded"
    return f"recorded, and 1/k for {unweighted:,} of {tokens:,} tokens that have none"

"""A whole replay under expert parallelism: what it needs, the measuring, the file at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_lens.errors import MoeLensError, ReplayError
from moe_lens.replay import machine, results
from moe_lens.replay.ep import summary
from moe_lens.replay.ep.all_to_all import Link, link_of
from moe_lens.replay.ep.counted import Row, Width
from moe_lens.replay.ep.groups import Batch, Chosen, batches, choose_groups
from moe_lens.replay.ep.plans import check_world, plans_of
from moe_lens.replay.ep.real import exchanged
from moe_lens.replay.ep.settings import Parallel, row_bytes
from moe_lens.replay.ep.simulate import simulated
from moe_lens.replay.ep.world import World, environment
from moe_lens.replay.floors import Shape
from moe_lens.replay.index import Index, index_of
from moe_lens.replay.placement.counts import placed_layers
from moe_lens.replay.placement.methods import METHODS
from moe_lens.replay.placement.plan import Placement
from moe_lens.replay.session import Progress, short_collections, weights_from
from moe_lens.replay.settings import Settings, check_memory, device_of, dtype_of, shape_of
from moe_lens.runtime.ceilings import device_name, versions
from moe_lens.runtime.layer import MoELayer
from moe_lens.runtime.weights import random_weights
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import open_run
from moe_lens.trace.schema import REPLAY_EP

_SAVE_EVERY_S = 5.0


@dataclass
class Replayed:
    """What a replay measured.

    Attributes:
        rows: Rows of `moe_lens.trace.schema.REPLAY_EP`.
        about: What the file's metadata says.
        path: The file that was written, by the first rank.
    """

    rows: list[Row]
    about: dict[str, Any]
    path: Path

    @property
    def interrupted(self) -> bool:
        return bool(self.about["state"] == "interrupted")

    def by_layer(self) -> list[summary.Summary]:
        """A row for each placement, phase and layer."""
        return summary.by_layer(self.rows)

    def answers(self) -> list[str]:
        """What the placement is worth: a sentence for each phase."""
        return summary.answers(self.rows, self.about)


def replay_ep(
    run: str | Path,
    parallel: Parallel,
    settings: Settings | None = None,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    world: World | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Replayed:
    """Replay a trace's routing over the ranks of an expert-parallel group.

    Args:
        run: Folder of the trace.
        parallel: The group, its placement and its all-to-all.
        settings: What to replay, and how; `stages` and `curve` do not count.
        name: Of the result, `RUN/replay_ep/<name>.parquet`; None: after what is replayed.
        out: Another file to write in its place; not together with `name`.
        world: The processes that are the ranks. None: they are simulated on one device.
        on_progress: Called when a layer of a forward is done.

    Raises:
        TraceError: Not a trace.
        ReplayError: Nothing to replay, a placement that does not fit, no room, no place to write;
            said before any work. Or another rank ended.
        KeyboardInterrupt: Before anything was measured.
    """
    settings = settings or Settings()
    try:
        work, output = _prepared(run, parallel, settings, name, out, world, on_progress)
        failed = None
    except MoeLensError as e:
        if world is None:
            raise
        failed = e
    if world is not None:
        world.agreed(failed)
    with machine.one_thread(work.device):
        return work.run(output)


def _prepared(
    run: str | Path,
    parallel: Parallel,
    settings: Settings,
    name: str | None,
    out: str | Path | None,
    world: World | None,
    on_progress: Callable[[Progress], None],
) -> tuple[_Session, results.Output | None]:
    """All that can be refused before any work. Ranks after the first write nothing: no output."""
    if name is not None and out is not None:
        raise ReplayError(
            f"--name {name} and --out {out} both say where the result is to lie: give one of them."
        )
    if world is not None:
        check_world(parallel, world)
    files = open_run(run)
    infos = {info.layer: info for info in placed_layers(files, settings.layers)}
    index = index_of(files, layers=frozenset(infos), phase=settings.phase, steps=settings.steps)
    plans = plans_of(files, parallel, frozenset(infos))
    chosen = choose_groups(index, settings.forwards, partial=settings.partial)
    if chosen.most_tokens < parallel.ranks:
        raise ReplayError(
            f"{files.path}: the largest forward has {chosen.most_tokens} tokens, fewer than "
            f"{parallel.ranks} ranks: not every rank has one. Take a smaller --ep."
        )
    work = _Session(index, chosen, infos, plans, parallel, settings, world, on_progress)
    path = Path(out) if out is not None else None
    if path is None:
        path = results.result_path(files.path, work.name if name is None else name, REPLAY_EP)
    work.path = path
    return work, None if world is not None and world.rank else results.Output(path, REPLAY_EP)


class _Session:
    """One replay at work."""

    def __init__(
        self,
        index: Index,
        chosen: Chosen,
        infos: dict[int, LayerInfo],
        plans: list[Placement],
        parallel: Parallel,
        settings: Settings,
        world: World | None,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.index, self.chosen, self.infos, self.plans = index, chosen, infos, plans
        self.parallel, self.settings, self.world = parallel, settings, world
        self.on_progress, self.begun = on_progress, time.monotonic()
        self.device = device_of(settings) if world is None else world.device
        self.dtype = dtype_of(settings, self.device)
        self.device_name = device_name(self.device)
        self.shapes = {n: shape_of(info, settings, self.dtype) for n, info in infos.items()}
        self.link: Link | None = None
        if world is None:
            self.link = link_of(
                parallel.all_to_all,
                device_name=self.device_name,
                ranks=plans[0].ranks,
                nodes=plans[0].nodes,
            )
        first = next(batches(index, list(infos), chosen.groups[:1], settings.policy))
        slots = max(plan.slots_per_rank for plan in plans)
        for batch in first:
            shape = replace(self.shapes[batch.layer], experts=slots)
            top_k = batch.expert_ids_TK.shape[1]
            check_memory(shape, self.dtype, chosen.most_tokens, top_k, self.device)
        self.rows: list[Row] = []
        self.path = Path()
        self.layers: dict[Shape, dict[int, MoELayer]] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.unweighted = self.seen = self.forwards = 0
        self.backends: dict[str, str] = {}

    @property
    def mode(self) -> str:
        return "simulated" if self.world is None else "real"

    @property
    def name(self) -> str:
        """What the result is called if nobody says."""
        plan = self.plans[0]
        words = [f"ep{plan.ranks}", machine.slug(plan.method.removesuffix(".json"))]
        if plan.nodes > 1:
            words.append(f"{plan.nodes}-nodes")
        if not self.parallel.dedup:
            words.append("no-dedup")
        if self.parallel.dispatch_dtype is not None:
            words.append(self.parallel.dispatch_dtype)
        if self.parallel.all_to_all is not None:
            words.append(machine.slug(Path(self.parallel.all_to_all).stem))
        words.append(self.mode)
        rest = results.name_of(self.settings, list(self.shapes.values()), self.device_name)
        return "-".join([*words, rest])

    def run(self, output: results.Output | None) -> Replayed:
        """Measure, and write what came of it."""
        state = "complete"
        try:
            with short_collections():
                self._measure(output)
        except KeyboardInterrupt:
            if not self.rows or self.world is not None:
                raise
            state = "interrupted"
        except BaseException:
            if self.rows and output is not None:
                output.so_far(self.rows, self._about("interrupted"))
            raise
        if not self.rows:
            raise ReplayError(f"{self.index.files.path}: no forward that was chosen has a token.")
        about = self._about(state)
        if output is None:
            return Replayed(self.rows, about, self.path)
        if state == "complete":
            output.complete(self.rows, about)
            return Replayed(self.rows, about, output.path)
        output.so_far(self.rows, about)
        return Replayed(self.rows, about, output.unfinished)

    def _measure(self, output: results.Output | None) -> None:
        groups, policy = self.chosen.groups, self.settings.policy
        before = saved = time.monotonic()
        longest = 0.0
        for done, found in enumerate(batches(self.index, list(self.infos), groups, policy)):
            if self._time_is_up(longest):
                return
            for batch in found:
                if batch.tokens:
                    self.rows += self._batch(batch)
                    now = f"{batch.phase}, layer {batch.layer}"
                    self.on_progress(Progress(done, len(groups), now))
            self.forwards += 1
            now_s = time.monotonic()
            if done or self.device.type == "cpu":  # the first on a GPU compiles its kernels
                longest = max(longest, now_s - before)
            before = now_s
            if output is not None and now_s - saved > _SAVE_EVERY_S:
                output.so_far(self.rows, self._about("interrupted"))
                saved = time.monotonic()

    def _time_is_up(self, longest: float) -> bool:
        """Whether the next forward would end too late; the first one runs in any case."""
        if self.settings.seconds is None or not self.forwards:
            return False
        late = time.monotonic() - self.begun + longest > self.settings.seconds
        return late if self.world is None else self.world.first_says(late)

    def _batch(self, batch: Batch) -> list[Row]:
        shape = self.shapes[batch.layer]
        layers = self._layers(shape)
        self.unweighted += batch.unweighted
        self.seen += batch.tokens
        backend = layers[self.plans[0].slots_per_rank].backend
        self.backends[backend.name] = backend.why
        width = self._width(batch.layer, shape)
        dedup, repeats = self.parallel.dedup, self.settings.repeats

        def tokens(count: int) -> torch.Tensor:
            return self._tokens(count, shape.hidden)

        if self.world is not None:
            return exchanged(
                batch, self.plans, layers, tokens, width, self.world, dedup=dedup, repeats=repeats
            )
        assert self.link is not None
        return simulated(
            batch, self.plans, layers, tokens, width, self.link, dedup=dedup, repeats=repeats
        )

    def _layers(self, shape: Shape) -> dict[int, MoELayer]:
        """For each number of slots a rank has, a layer of as many experts: weights are shared."""
        if shape not in self.layers:
            self.on_progress(Progress(0, 1, "making random weights"))
            counts = {plan.slots_per_rank for plan in self.plans}
            seed = self.settings.seed + (0 if self.world is None else self.world.rank)
            gate_up_E2FD, down_EDF = random_weights(
                max(counts),
                shape.hidden,
                shape.intermediate,
                dtype=self.dtype,
                device=self.device,
                seed=seed,
            )
            backend = self.settings.backend
            self.layers[shape] = {
                n: MoELayer(gate_up_E2FD[:n], down_EDF[:n], backend=backend) for n in counts
            }
        return self.layers[shape]

    def _tokens(self, count: int, hidden: int) -> torch.Tensor:
        """So many random tokens: the same ones again where they are enough."""
        held = self.inputs.get(hidden)
        if held is None or len(held) < count:
            generator = torch.Generator(self.device).manual_seed(self.settings.seed)
            made = torch.randn(count, hidden, device=self.device, generator=generator)
            held = self.inputs[hidden] = made.to(self.dtype)
        return held[:count]

    def _width(self, layer: int, shape: Shape) -> Width:
        """Bytes of a row: as wide as the trace says, unless other sizes are asked for."""
        own = self.infos[layer]
        given = self.settings.hidden is not None or self.settings.preset is not None
        elements = shape.hidden if given or self.world else own.dispatch_width or shape.hidden
        sent = row_bytes(elements, self.parallel.dispatch_dtype, self.dtype)
        return Width(sent, row_bytes(elements, None, self.dtype))

    def _about(self, state: str) -> dict[str, Any]:
        plan = self.plans[0]
        return {
            "state": state,
            "run": self.index.files.path.name,
            "run_id": self.index.files.meta.run_id,
            "model": self.index.files.meta.model,
            "imported": self.index.files.meta.imported,
            "made_steps": self.index.files.meta.steps,
            "mode": self.mode,
            "parallel": asdict(self.parallel),
            "placement": {
                "name": plan.method,
                "fitted": self.parallel.placement in METHODS[1:],  # the first needs no counts
                "ranks": plan.ranks,
                "nodes": plan.nodes,
                "experts": plan.experts,
                "slots_per_rank": plan.slots_per_rank,
                "replicas": plan.slots - plan.experts,
            },
            "baseline": self.plans[1].method if len(self.plans) > 1 else None,
            "dedup": self.parallel.dedup,
            "exchange": "modelled" if self.world is None else "measured",
            "all_to_all": asdict(self.link) if self.link is not None else None,
            "world": environment(self.device, self.world.backend) if self.world else None,
            "policy": asdict(self.settings.policy),
            "renormalised": self.settings.policy.top_k is not None
            and all(info.normalised is True for info in self.infos.values()),
            "weights": weights_from(self.unweighted, self.seen),
            "expert_weights": "random",
            "preset": asdict(self.settings.preset) if self.settings.preset else None,
            "shapes": [
                {
                    "layer": n,
                    **asdict(shape),
                    "top_k": self.infos[n].top_k,
                    **asdict(self._width(n, shape)),
                }
                for n, shape in sorted(self.shapes.items())
            ],
            "device": str(self.device),
            "device_name": self.device_name,
            "clock": self._clock(),
            "versions": versions(),
            "backends": self.backends,
            "repeats": self.settings.repeats,
            "seconds": time.monotonic() - self.begun,
            "forwards": {
                "in_trace": self.index.forwards,
                "with_rows": self.chosen.recorded,
                "left_out": self.chosen.left_out,
                "chosen": len(self.chosen.groups),
                "replayed": self.forwards,
            },
            "padding_rows": self.index.padding,
        }

    def _clock(self) -> str:
        if self.device.type == "cpu":
            return "process CPU time, one thread"
        if self.world is None:
            return "CUDA events, cold L2"
        return "wall time until the device is done"

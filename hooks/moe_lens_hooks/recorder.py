"""`record`: from a model that runs to a trace on disk."""

from __future__ import annotations

import atexit
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from moe_lens.errors import CaptureBreach, MoeLensError, TraceWriteError
from moe_lens.trace.events import Staged, StepEnd
from moe_lens.trace.meta import Attempt, Meta
from moe_lens.trace.writer import TraceWriter
from moe_lens_hooks.adapter import Adapter
from moe_lens_hooks.adapters import all_adapters
from moe_lens_hooks.adapters.fallback import unseen
from moe_lens_hooks.attach import attach
from moe_lens_hooks.by_hand import log
from moe_lens_hooks.capture import Capture
from moe_lens_hooks.ending import at_close, close_writer, ended, look_for_edits
from moe_lens_hooks.expert_weights import places
from moe_lens_hooks.finding import edited, find_layers, named_modules
from moe_lens_hooks.forks import forget_in_child
from moe_lens_hooks.forward import OpenForward
from moe_lens_hooks.intake import Intake
from moe_lens_hooks.losses import losses_of
from moe_lens_hooks.numbering import Numbering
from moe_lens_hooks.opening import (
    check_layout,
    check_options,
    open_for_writing,
    rank_and_world,
    root_modules,
    run_id,
    versions,
)
from moe_lens_hooks.parts import open_forwards_at, parts_of
from moe_lens_hooks.pausing import NOT_RECORDED, SkippedForward, Switch
from moe_lens_hooks.said import StepContext, said
from moe_lens_hooks.sampling import Sampling, as_sampling
from moe_lens_hooks.scalars import StepTotals
from moe_lens_hooks.watch import Watch

REMEDY = (
    "Hooks do not fire in code that was compiled before they were attached (attach first, or call "
    "torch._dynamo.reset()), in CUDA graphs replayed without Python, or in kernels that bypass the "
    "module; see docs/hooks.md."
)


class Recorder:
    """Records every routing decision of a model into a trace, from construction to `close`.

    Use it in a `with`, or call `close` yourself. What the model computes is not changed.

    Args:
        model: Any model in which an adapter finds MoE layers; or the list of chunks that this rank
            runs in a pipeline, in the order in which a token passes them. None: only `log` is used.
        path: Folder of the trace; new, empty, or with `resume=True` an existing trace.
        tokens: Share of sequences (0 to 1) whose per-token rows are kept, or `every(n)`. Counts are
            kept of every token whatever this says.
        weights: "bf16" clears the low mantissa bits of stored gate weights (relative error at most
            2**-8); "exact" stores float32 as the experts got them.
        logits: Keep the router logits of the sampled tokens too.
        token_ids: Keep the vocabulary ids of the sampled tokens (they spell out the text).
        keys: Names of further columns of `sequences`, given per step by `step(keys=...)`.
        layout: How the model flattens `[B, S]` tokens: "bs", or "sb" as Megatron does.
        first_layer: Number of the first MoE layer, where this is a stage of a pipeline.
        adapters: Asked before those that come with moe_lens.
        max_bytes: Bound on the disk of this rank; the oldest per-token segments go first.
        resume: Go on with the trace that is in `path`; a step that is recorded again supersedes
            its earlier attempt.
        paused: Record nothing until `start`.
        on_breach: When an invariant of the capture fails: "raise" `CaptureBreach` at the end of a
            step, or "warn" and count.
        on_write_error: When the disk refuses: "raise" `TraceWriteError` at the end of a step, or
            "warn", stop recording and let the model run on.
        rank, world: Taken from torch.distributed where it is initialised.
        coordinates: Index of this rank along dp, tp, cp, sp, ep, pp. Stages of a pipeline after the
            first (pp above 0) count no tokens in `steps` and `slices`: the first did.
        copy: Another rank sees the same tokens (tensor parallelism): readers leave this rank's
            counts out of sums.

    Raises:
        NoMoELayers, UnsupportedRouter: Nothing to record, or nothing that can be seen.
        CaptureBreach: Another recorder is attached to the model.
        TraceError, TraceLocked, TraceWriteError: The folder cannot be used.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module] | None,
        path: str | Path,
        *,
        tokens: float | Sampling = 0.01,
        weights: Literal["bf16", "exact"] = "bf16",
        logits: bool = False,
        token_ids: bool = False,
        keys: Sequence[str] = (),
        layout: Literal["bs", "sb"] = "bs",
        first_layer: int = 0,
        adapters: Sequence[Adapter] = (),
        max_bytes: int | None = None,
        resume: bool = False,
        paused: bool = False,
        on_breach: Literal["raise", "warn"] = "raise",
        on_write_error: Literal["raise", "warn"] = "raise",
        rank: int | None = None,
        world: int | None = None,
        coordinates: dict[str, int] | None = None,
        copy: bool = False,
    ) -> None:
        self.path = Path(path)
        self._layout = layout
        check_options(keys, weights, layout, on_breach=on_breach, on_write_error=on_write_error)
        models = root_modules(model)
        layers = find_layers(models, [*adapters, *all_adapters()]) if models else []
        check_layout(layers, layout)
        own_rank, own_world = rank_and_world()
        world = own_world if world is None else world
        meta = Meta(
            run_id=run_id(world),
            rank=own_rank if rank is None else rank,
            world=world,
            coordinates=coordinates or {},
            counts="copy" if copy else "own",
            model=type(models[0]).__name__ if models else "",
            sampling=str(as_sampling(tokens)),
            weights=weights,
            keys=list(keys),
            attempts=[Attempt(0, time.time_ns())],
            versions=versions(),
        )
        opened = open_for_writing(self.path, meta, resume=resume)
        self._lock = opened.lock
        with ExitStack() as undo:  # whatever fails, nothing of us stays
            undo.callback(self._lock.release)
            self._capture = Capture(
                models,
                layers,
                self._begin,
                lambda *met: self._intake.meet(*met),
                lambda forward: self._intake.reduce(forward),
                self._end,
            )
            undo.callback(self._capture.detach)
            attach(self._capture, models, layers)
            if len(models) == 1:
                open_forwards_at(parts_of(models[0], layers), self._capture)
            try:
                self._writer = TraceWriter(
                    self.path, opened.meta, first_window=opened.next_window, max_bytes=max_bytes
                )
            except OSError as e:
                raise TraceWriteError(f"cannot write the trace {self.path}: {e}") from e
            undo.callback(self._writer.close)
            self._layers = layers
            self._edited = partial(edited, models, layers, [*adapters, *all_adapters()])
            self._context: StepContext | None = None
            self._numbering = Numbering(opened.next_step, resumed=opened.next_step > 0)
            self._forwards = self._steps = 0
            not_recorded = opened.meta.warnings.get(NOT_RECORDED, 0)
            self._switch = Switch(not paused, not_recorded, self._edit, lambda: self._intake.whole)
            self._skipped = 0  # of this step
            self._last_skipped = False
            self._of_step, self._last_step = StepTotals(), StepTotals()
            self._closed = False
            self._watch = Watch(self._writer, on_breach, on_write_error, self._detach)
            self._intake = Intake(
                models,
                as_sampling(tokens),
                layout,
                opened.next_sequence,
                opened.meta.tags,
                opened.meta.layers,
                places(layers),
                first_layer=first_layer,
                counts_tokens=meta.coordinates.get("pp", 0) == 0,
                keep_logits=logits,
                keep_token_ids=token_ids,
                put=self._put,
                edit=self._writer.edit,
                warn=self._watch.warn,
            )
            for text in unseen(named_modules(models), layers):
                self._watch.warn(text)
            undo.pop_all()
        forget_in_child(self)
        atexit.register(self._at_exit)

    # -- what users call -------------------------------------------------------------------------

    def start(self) -> None:
        """Record from the next forward on (of a step: from the next step). From any thread.

        Raises:
            TraceWriteError: The recording is closed, or the disk refused earlier.
        """
        if self._writer.failed is not None:
            raise self._writer.failed
        if self._closed:
            raise TraceWriteError(f"the recording into {self.path} is closed")
        self._switch.want(True)

    def stop(self) -> None:
        """Record nothing from the next forward on, until `start`. From any thread.

        What runs is recorded to its end: a forward; a step, with all its forwards; a beam search.
        Steps are numbered on, so those that are missing in the trace are those not recorded.
        Meanwhile `step`, `loss` and `log` do nothing, and `scalars` is empty.
        """
        self._switch.want(False)

    @contextmanager
    def step(
        self,
        tags: Any = None,
        *,
        sequences: Any = None,
        padding: Any = None,
        phase: str | None = None,
        keys: dict[str, Sequence[Any]] | None = None,
        number: int | None = None,
    ) -> Iterator[None]:
        """One step: an optimizer step, a request batch, an engine iteration.

        Every forward of the model inside it belongs to it.

        Args:
            tags: The slice of the data: one value, one per sequence `[B]` (or packed sequence), or
                one per token `[B, S]`. At most 32 distinct ones are told apart.
            sequences: Request ids `[B]`, ids per token `[B, S]`, or cumulative lengths of packed
                sequences `[0, …, B S]`. Unsaid: every row of every forward is a new sequence, but
                decoding goes on with those before.
            padding: True where padding `[B, S]`, or valid lengths `[B]`. Unsaid: from the
                attention mask that the model is given.
            phase: "train", "eval", "prefill", "decode" or a name of your own. Unsaid: from
                `model.training` and the cache.
            keys: Values, one or `[B]`, of the key columns that `record(keys=...)` declared.
            number: Number of the step, where the caller counts; must grow, or be the last once
                more: these are further forwards of it, then (an evaluation after a training step),
                and so are those outside of any step. After `resume` the first may go back, which
                supersedes what was recorded from there on.

        Raises:
            CaptureBreach, TraceWriteError: At its end; see `on_breach` and `on_write_error`.
            ValueError: A value does not fit the batch (raised in the forward), or a number not
                above the last.
        """
        if self._context is not None:
            raise CaptureBreach("rec.step inside rec.step: end the first one before the next.")
        self._capture.end_implicit()
        given = said(tags, sequences, padding, phase, keys, self._writer.meta.keys)
        self._numbering.begin(number)
        self._switch.take()
        self._context, self._of_step = given, StepTotals()
        try:
            yield
        except BaseException:
            self._end_step()
            raise
        ran = len(self._of_step) > 0 or self._capture.current is not None
        ever = ran or self._forwards or self._switch.skipped or not self._switch.on
        self._end_step()
        if not ever and not self._closed and not self._writer.failed:
            self._watch.breach(
                "a step ended in which the recorded model did not run, nor in any before it. "
                + REMEDY
            )
        self._watch.check()

    def loss(self, loss: Tensor) -> None:
        """Losses of the last forward, in the user's unit (nats, if cross entropy).

        Args:
            loss: `[B, S]` or `[B, S - 1]`, the loss of the prediction made at each position (NaN
                where there is none), or `[B]`, a sequence's mean over its valid tokens.

        Raises:
            ValueError: Another shape.
            CaptureBreach: No forward has run.
        """
        if self._writer.failed or self._closed:
            return
        self._capture.end_implicit()
        if not self._last_skipped:
            last = self._of_step.last or self._last_step.last
            self._writer.put(losses_of(last, loss, self._layout))

    def log(
        self,
        layer: int | str,
        expert_ids: Tensor,
        weights: Tensor,
        logits: Tensor | None = None,
        *,
        experts: int | None = None,
        kept: Tensor | None = None,
        capacity: int | None = None,
        groups: int | None = None,
        top_groups: int | None = None,
    ) -> None:
        """Record the routing of a layer by hand, for a router that no adapter sees.

        Inside a forward of the recorded model it belongs to that forward; otherwise the calls of
        one step, or until a layer comes again, make one.

        Args:
            layer: A name or number, the same for the layer each time.
            expert_ids: int `[T, K]` or `[B, S, K]`: what the experts were given.
            weights: float, same shape: gate weights.
            logits: float `[T, E]` or `[B, S, E]`.
            experts: E, where no logits tell.
            kept: bool, shape of `expert_ids`: False where the expert was full.
            capacity: Choices that one expert takes.
            groups: Equal groups of neighbouring experts, among which the router chooses first.
            top_groups: How many of them a token may use.

        Raises:
            ValueError: Shapes that disagree, E neither given nor to be seen, uneven groups.
        """
        limit = (groups, top_groups)
        log(self._capture, layer, expert_ids, weights, logits, experts, kept, capacity, limit)

    def flush(self) -> None:
        """Return when everything before, open windows included, would survive `kill -9`.

        Raises:
            CaptureBreach, TraceWriteError: As at the end of a step.
        """
        if self._context is None:
            self._capture.end_implicit()
        if self._writer.failed is None and not self._closed:
            try:
                self._flush_written()
            except TraceWriteError:
                if self._watch.raise_write_error:
                    raise
        self._watch.check()

    def scalars(self) -> dict[str, float]:
        """At most ten numbers per layer of the last step, for a logger: `moe/layer0/entropy`, ….

        Waits for the step's numbers, where they are still on a device.
        """
        return self._last_step.scalars()

    def close(self, error: BaseException | None = None) -> None:
        """Detach from the model, write everything, seal the trace. A second call does nothing.

        Args:
            error: What ended the recording early; noted in the trace, and no breach is raised over
                it.

        Raises:
            CaptureBreach, TraceWriteError: As at the end of a step; a recording that saw no
                forward at all is a breach too, unless it was paused all the time.
        """
        if self._closed:
            return
        self._context = self._context or StepContext()  # what ends now raises below, when sealed
        self._end_step()
        self._detach()
        self._switch.note()
        self._closed = True
        atexit.unregister(self._at_exit)
        never = [x.info.path for x in self._layers if x.block not in self._capture.entered]
        unused = not self._forwards and (self._switch.skipped > 0 or not self._switch.ever)
        try:
            if error is None:
                look_for_edits(self._edited, self._watch)
            if not self._forwards and not unused and error is None and not self._writer.failed:
                self._watch.breach(f"nothing was recorded into {self.path}. {REMEDY}")
            if self._capture.aborted:
                self._watch.count("forwards that an exception ended", self._capture.aborted)
            self._writer.edit(ended([] if unused else never, error))
        finally:
            raises = error is None and self._watch.raise_write_error
            close_writer(self._writer, self._lock, raises=raises)
        if error is None:
            self._watch.check()
            if text := at_close(self.path, never, self._switch.skipped, unused=unused):
                warnings.warn(text, stacklevel=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close(error)

    # -- what the hooks call ---------------------------------------------------------------------

    def _begin(self, inputs: dict[str, Any], implicit: bool) -> OpenForward:
        if self._context is None:
            self._of_step = StepTotals()
            self._numbering.outside()
            self._switch.take()
        context = self._context or StepContext()
        number = self._numbering.take()
        if not self._switch.on:
            self._switch.skipped += 1
            self._intake.skip(inputs)
            step, switch = self._numbering.step, self._switch
            return SkippedForward(step, number, "paused", implicit=implicit, switch=switch)
        return self._intake.begin(self._numbering.step, number, context, inputs, implicit)

    def _end(self, forward: OpenForward) -> None:
        self._last_skipped = isinstance(forward, SkippedForward)
        if self._last_skipped:
            self._skipped += 1
        else:
            self._end_recorded(forward)
        self._watch.problems(forward, {*self._capture.refused, self._capture.blind})
        if self._context is None:
            self._end_step()
            self._watch.check()

    def _end_recorded(self, forward: OpenForward) -> None:
        blind = self._capture.blind
        if blind and not forward.problems:
            forward.problem(blind)
        elif not forward.expected and not blind:
            forward.problem(
                f"the model ran, but none of its {len(self._layers)} MoE blocks was entered. "
                + REMEDY
            )
        for text in self._capture.take_left_out() if not blind else ():
            self._watch.warn(text)
        with torch.inference_mode():
            self._intake.over(forward)
        forward.close()
        self._forwards += 1
        self._of_step.add(forward)
        self._put(forward)

    # -- the rest --------------------------------------------------------------------------------

    def _end_step(self) -> None:
        inside = self._context is not None
        try:
            self._capture.end_implicit()
            self._capture.abandon()
        finally:  # whatever it was, the next step can begin
            self._context = None
        self._last_step, self._of_step = self._of_step, StepTotals()
        if len(self._last_step):
            self._put(StepEnd(self._numbering.step))
            self._steps += 1
        if len(self._last_step) + self._skipped:
            self._numbering.end(inside=inside)
        self._skipped = 0

    def _flush_written(self) -> None:
        """The part of `flush` that may run on any thread: it leaves the model alone."""
        self._switch.note()
        self._writer.flush()

    def _put(self, event: Staged) -> None:
        if self._writer.failed is None and not self._closed:
            self._writer.put(event)

    def _edit(self, change: Callable[[Meta], None]) -> None:
        if self._writer.failed is None and not self._closed:
            self._writer.edit(change)

    def _detach(self) -> None:
        self._capture.detach()
        self._intake.detach()

    def _at_exit(self) -> None:
        """The interpreter ends and nobody closed the recorder."""
        try:
            self.close()
        except MoeLensError as e:
            warnings.warn(f"while closing {self.path} at exit: {e}", stacklevel=1)

    def _forget(self) -> None:
        """In a forked child: the writer's thread is not here, and the trace is the parent's."""
        self._closed = True
        self._detach()
        atexit.unregister(self._at_exit)


record = Recorder
"""`with moe_lens.record(model, path) as rec:` — see `Recorder`."""

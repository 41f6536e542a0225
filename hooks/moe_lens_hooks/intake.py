"""What the hooks report becomes a forward: each block's routing is checked, described, reduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_lens.trace.meta import LayerInfo, Meta
from moe_lens.trace.schema import MAX_TAGS, OTHER
from moe_lens_hooks.adapter import MoELayer, Observed
from moe_lens_hooks.batch import Batch, Describer, StepContext, padding_from_mask
from moe_lens_hooks.forward import OpenForward, Pending, Seen
from moe_lens_hooks.inputs import batch_shape, cached_positions, phase_of
from moe_lens_hooks.reduce import reduce
from moe_lens_hooks.sampling import Sampling
from moe_lens_hooks.semantics import Semantics, learn

PENDING_BYTES = 32 << 20
"""Bytes of routing tensors that a forward may hold before they are reduced: many small layers are
reduced at once, large ones as they come."""

Key = tuple[Any, int]
"""What a layer is known by: its block (or its name in `rec.log`), and which call of it in a
forward, since blocks may be shared."""


class Intake:
    """Numbers the layers in the order in which they run, and takes what is seen of them.

    Args:
        model: For the phase: training or not.
        sampling: Whose per-token rows are kept.
        layout: How the model flattens.
        first_sequence: Number of the first sequence.
        tags: Tags known already (when resuming).
        layers: Layers known already (when resuming).
        first_layer: Number of the first layer.
        counts_tokens: False on a later stage of a pipeline.
        keep_logits, keep_token_ids: Of sampled tokens.
        edit: Changes the meta file.
        warn: Tells the user.
    """

    def __init__(
        self,
        model: nn.Module | None,
        sampling: Sampling,
        layout: str,
        first_sequence: int,
        tags: list[str],
        layers: list[LayerInfo],
        *,
        first_layer: int = 0,
        counts_tokens: bool = True,
        keep_logits: bool,
        keep_token_ids: bool,
        edit: Callable[[Callable[[Meta], None]], None],
        warn: Callable[[str], None],
    ) -> None:
        self.infos: dict[Key, LayerInfo] = {}
        self._model = model
        self._sampling = sampling
        self._layout = layout
        self._describer = Describer(self._admit, layout, first_sequence)
        self._tags = list(tags)
        self._layers = {x.layer: x for x in layers}
        self._numbers = {x.path: x.layer for x in layers}
        self._first_layer = first_layer
        self._counts_tokens = counts_tokens
        self._keep_logits, self._keep_token_ids = keep_logits, keep_token_ids
        self._edit, self._warn = edit, warn
        self._meanings: dict[int, Semantics | None] = {}

    def begin(
        self,
        step: int,
        number: int,
        context: StepContext,
        inputs: dict[str, Any],
        implicit: bool,
    ) -> OpenForward:
        """A forward begins; see `OpenForward`."""
        ids = inputs.get("input_ids", inputs.get("tokens")) if self._keep_token_ids else None
        return OpenForward(
            step=step,
            forward=number,
            phase=context.phase or phase_of(self._model, inputs),
            context=context,
            inputs=inputs,
            past=cached_positions(inputs),
            implicit=implicit,
            counts_tokens=self._counts_tokens,
            token_ids=ids if isinstance(ids, Tensor) else None,
            sampled=self._sampling.share > 0 and step % self._sampling.every == 0,
        )

    def fire(
        self,
        forward: OpenForward,
        layer: MoELayer,
        times: int,
        shape: tuple[int, int] | None,
        seen: Observed,
    ) -> None:
        """A block of the model ran, `times` before in this forward."""
        info = layer.info if times == 0 else replace(layer.info, path=f"{layer.info.path} #{times}")
        self.take(forward, (layer.block, times), info, layer.router, shape, seen)

    def take(
        self,
        forward: OpenForward,
        key: Key,
        info: LayerInfo,
        router: nn.Module | None,
        shape: tuple[int, int] | None,
        seen: Observed,
    ) -> None:
        """Check, describe and reduce what was seen of one layer.

        Raises:
            ValueError: What the user said of the step does not fit the batch.
        """
        ids = seen.expert_ids_TK
        assert ids is not None
        if wrong := _misshapen(self.infos.get(key, info), seen):
            forward.problem(f"{info.path}: {wrong}. Its routing cannot be recorded")
            return
        experts = info.experts + info.zero_experts
        known = self.infos.get(key)
        if known is None:
            # A layer is seen for the first time: its number is its place in the order of calls.
            # One that an earlier attempt saw keeps the number it had.
            number = self._numbers.setdefault(info.path, self._first_layer + len(self._numbers))
            before = self._layers.get(number)
            k = _fixed_k(info, seen)
            if before is not None and (before.experts, before.top_k) != (info.experts, k):
                forward.problem(
                    f"{info.path} has {info.experts} experts, top-{k}, in the "
                    f"resumed trace {before.experts}, top-{before.top_k}. Record into a new folder"
                )
                return
            known = replace(info, layer=number, top_k=k)
            self._note(key, known, learn(seen, router, experts))
        elif self._meanings[known.layer] is None:  # the forwards before had no usable token
            self._note(key, known, learn(seen, router, experts))
        meaning = self._meanings[known.layer]
        batch = forward.batches.get(info.stream)
        if batch is None:
            batch = self._describe(forward, info.stream, shape, seen)
            forward.batches[info.stream] = batch
        if seen.token_T is not None:
            seen = seen.laid_out(batch.size)
            ids = _not_none(seen.expert_ids_TK)
        if batch.size != len(ids):
            forward.problem(
                f"{info.path} routed {len(ids)} tokens, but the forward has {batch.size} "
                f"({info.stream}). Its routing cannot be recorded"
            )
            return
        forward.seen += 1
        forward.pending.append(Pending(self.infos[key], seen, meaning))
        if sum(p.nbytes for p in forward.pending) > PENDING_BYTES:
            self.reduce(forward)

    def reduce(self, forward: OpenForward) -> None:
        """Turn what is pending of a forward into counts, layers of one kind together."""
        kinds: dict[tuple[Any, ...], list[Pending]] = {}
        for p in forward.pending:
            kinds.setdefault(p.kind, []).append(p)
        forward.pending = []
        for group in kinds.values():
            info, first = group[0].info, group[0].observed
            assert first.expert_ids_TK is not None
            for p in group:
                if p.observed.changed:
                    forward.problem(f"{p.info.path} changed its routing in place after it was used")
            # The model's autocast must not reach into our sums.
            with torch.autocast(first.expert_ids_TK.device.type, enabled=False):
                reduced = reduce(
                    [p.observed for p in group],
                    forward.batches[info.stream],
                    [p.meaning for p in group],
                    info.experts + info.zero_experts,
                    logits=self._keep_logits,
                    faithful=info.faithful,
                )
            layers = [(p.info, p.observed.capacity, p.observed.capacity_groups) for p in group]
            forward.layers.append(Seen(info.stream, len(first.expert_ids_TK), layers, reduced))

    def _note(self, key: Key, info: LayerInfo, meaning: Semantics | None) -> None:
        """Keep what is known of a layer, here and in the trace's meta."""
        if meaning is not None:
            info = replace(
                info,
                score=meaning.score,
                selection=meaning.selection,
                normalised=meaning.normalised,
                selection_bias="bias" in (meaning.selection or ""),
            )
        elif key in self.infos:
            return
        self.infos[key], self._meanings[info.layer] = info, meaning
        self._layers[info.layer] = info
        infos = [self._layers[i] for i in sorted(self._layers)]
        self._edit(lambda meta: setattr(meta, "layers", infos))

    def _describe(
        self, forward: OpenForward, stream: str, shape: tuple[int, int] | None, seen: Observed
    ) -> Batch:
        ids = _not_none(seen.expert_ids_TK)
        tokens = len(ids) if seen.token_T is None else None
        B, S = batch_shape(forward.inputs, stream, shape, tokens, self._layout)
        decoder = stream == "decoder"
        mask = forward.inputs.get("decoder_attention_mask" if decoder else "attention_mask")
        positions = forward.inputs.get("position_ids")

        def keeps(sequences: NDArray[np.int64]) -> NDArray[np.bool_]:
            return self._sampling.keeps(forward.step, sequences)

        return self._describer.describe(
            (B, S),
            forward.context,
            padding=padding_from_mask(mask, B, S),
            positions=positions if isinstance(positions, Tensor) else None,
            past=0 if stream == "encoder" else forward.past,
            continues=forward.past > 0 or bool(forward.batches),
            keeps=keeps,
            device=ids.device,
        )

    def _admit(self, tag: str) -> str:
        """The tag itself, or `other` once there are too many."""
        if tag in self._tags:
            return tag
        if len(self._tags) >= MAX_TAGS:
            self._warn(
                f"more than {MAX_TAGS} tags: further ones are counted as '{OTHER}'. Slice finer "
                "through record(keys=[...]) and the table `sequences`"
            )
            return OTHER
        self._tags.append(tag)
        tags = list(self._tags)
        self._edit(lambda meta: setattr(meta, "tags", tags))
        return tag


def _not_none(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _fixed_k(info: LayerInfo, seen: Observed) -> int | None:
    """Choices of every token; None where it is the router's to say how many."""
    return None if seen.chosen_TK is not None else _not_none(seen.expert_ids_TK).shape[1]


def _misshapen(info: LayerInfo, seen: Observed) -> str | None:
    """What is wrong with the shapes and types of what was seen, that no counting can mend."""
    ids, weights = seen.expert_ids_TK, seen.weights_TK
    assert ids is not None
    assert weights is not None
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 2:
        return f"expert ids are {ids.dtype} {list(ids.shape)}, not integers [T, K]"
    if not weights.is_floating_point() or weights.shape != ids.shape:
        return f"weights are {weights.dtype} {list(weights.shape)} for ids {list(ids.shape)}"
    if info.top_k is not None and ids.shape[1] != info.top_k:
        return f"{ids.shape[1]} choices per token, but the router is configured for {info.top_k}"
    if seen.router_ids_TK is not None and seen.router_ids_TK.shape != ids.shape:
        return (
            f"the router chose {list(seen.router_ids_TK.shape)}, the experts got {list(ids.shape)}"
        )
    experts = info.experts + info.zero_experts
    if seen.logits_TE is not None and tuple(seen.logits_TE.shape) != (len(ids), experts):
        got = list(seen.logits_TE.shape)
        return f"logits are {got} for {len(ids)} tokens and {experts} experts"
    for name, mask in (("kept", seen.kept_TK), ("chosen", seen.chosen_TK)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != ids.shape):
            return f"{name} is {mask.dtype} {list(mask.shape)}, not bool {list(ids.shape)}"
    if seen.token_T is not None and seen.token_T.shape != (len(ids),):
        return f"token_T is {list(seen.token_T.shape)} for {len(ids)} rows of routing"
    return None

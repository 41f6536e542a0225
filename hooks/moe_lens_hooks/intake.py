"""What the hooks report becomes a forward: each block's routing is checked, described, reduced."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_lens.trace.meta import LayerInfo, Meta
from moe_lens.trace.schema import MAX_TAGS, OTHER
from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.batch import Batch
from moe_lens_hooks.describe import Describer, Given
from moe_lens_hooks.following import Following, Going
from moe_lens_hooks.forward import Block, Key, OpenForward, Pending, Seen
from moe_lens_hooks.inputs import batch_shape, packed_lengths, token_ids
from moe_lens_hooks.lineage import Line, Routed, StagedOutcomes
from moe_lens_hooks.masks import padding_from_mask
from moe_lens_hooks.reduce import reduce
from moe_lens_hooks.said import DoesNotFit, StepContext, last_positions
from moe_lens_hooks.sampling import Sampling
from moe_lens_hooks.semantics import Semantics, learn


class Intake:
    """Numbers the layers in the order in which they run, and takes what is seen of them.

    Args:
        models: The recorded root modules.
        sampling: Whose per-token rows are kept.
        layout: How the model flattens.
        first_sequence: Number of the first sequence.
        tags: Tags known already (when resuming).
        layers: Layers known already (when resuming).
        places: Of each block, where the weights of its experts lie.
        first_layer: Number of the first layer.
        counts_tokens: False on a later stage of a pipeline.
        keep_logits, keep_token_ids: Of sampled tokens.
        put: Takes what became of tokens.
        edit: Changes the meta file.
        warn: Tells the user.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        sampling: Sampling,
        layout: str,
        first_sequence: int,
        tags: list[str],
        layers: list[LayerInfo],
        places: Mapping[nn.Module, Sequence[Hashable]],
        *,
        first_layer: int = 0,
        counts_tokens: bool = True,
        keep_logits: bool,
        keep_token_ids: bool,
        put: Callable[[StagedOutcomes], None],
        edit: Callable[[Callable[[Meta], None]], None],
        warn: Callable[[str], None],
    ) -> None:
        self.infos: dict[Key, LayerInfo] = {}
        self._models = models
        self._sampling = sampling
        self._layout = layout
        self._describer = Describer(self._admit, layout, first_sequence)
        self._following = Following(models, self._describer.fork, put)
        self._encoded: list[Line] | None = None
        """Sequences that an encoder read last: a decoder may go on with them."""
        self._tags = list(tags)
        self._layers = {x.layer: x for x in layers}
        self._numbers = {x.path: x.layer for x in layers}
        self._places = places
        self._names: dict[Hashable, str] = {}
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
        going = self._following.begin(inputs)
        ids = token_ids(inputs, self._layout) if self._keep_token_ids else {}
        if self._keep_token_ids and not ids:
            self._warn(
                "token_ids=True, and a forward was given none under the names input_ids, tokens or "
                "decoder_input_ids: its token_id is null"
            )
        return OpenForward(
            step=step,
            forward=number,
            phase=context.phase or self._phase(going),
            context=context,
            inputs=inputs,
            going=going,
            implicit=implicit,
            counts_tokens=self._counts_tokens,
            token_ids=ids,
            sampled=self._sampling.share > 0 and step % self._sampling.every == 0,
        )

    def skip(self, inputs: dict[str, Any]) -> None:
        """A forward begins that is not recorded."""
        self._following.skip(inputs)
        if inputs.get("encoder_outputs") is None:  # an encoder reads others
            self._encoded = None

    @property
    def whole(self) -> bool:
        """What runs can only be followed from its beginning to its end."""
        return self._following.whole

    def meet(self, forward: OpenForward, block: Block) -> None:
        """A layer has run. With the first of a stream it is settled whose its tokens are.

        At once: the masks and positions that tell it may be changed before the forward is over.

        Raises:
            DoesNotFit: What the user said of the step does not fit the batch.
        """
        if block.info.stream in forward.batches or _misshapen(block.info, block.seen):
            return
        try:
            batch = self._describe(forward, block.info.stream, block.shape, block.seen)
        except DoesNotFit:
            raise
        except Exception as e:
            forward.problem(_unreadable(block.info, e))
        else:
            forward.batches[block.info.stream] = batch

    def _take(self, forward: OpenForward, block: Block) -> Pending | None:
        """Check what was seen of one layer; None where it cannot be recorded."""
        key, info, router, seen = block.key, block.info, block.router, block.seen
        ids = seen.expert_ids_TK
        assert ids is not None
        if wrong := _misshapen(self.infos.get(key, info), seen):
            forward.problem(f"{info.path}: {wrong}. Its routing cannot be recorded")
            return None
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
                return None
            known = replace(info, layer=number, top_k=k, identities=self._whose(key, info, number))
            self._note(key, known, learn(seen, router, experts, info))
        elif self._meanings[known.layer] is None:  # the forwards before had no usable token
            self._note(key, known, learn(seen, router, experts, info))
        meaning = self._meanings[known.layer]
        self.meet(forward, block)
        batch = forward.batches.get(info.stream)
        if batch is None:  # its tokens could not be described
            return None
        if seen.token_T is not None:
            seen = seen.laid_out(batch.size)
            ids = _not_none(seen.expert_ids_TK)
        if batch.size != len(ids):
            forward.problem(
                f"{info.path} routed {len(ids)} tokens, but the forward has {batch.size} "
                f"({info.stream}). Its routing cannot be recorded"
            )
            return None
        forward.seen += 1
        return Pending(self.infos[key], seen, meaning, block.times)

    def _whose(self, key: Key, info: LayerInfo, number: int) -> list[int | str] | None:
        """The identities of a layer's experts, named by the first layer that ran them."""
        if info.identities is not None or not isinstance(key[0], nn.Module):
            return info.identities
        found = enumerate(self._places.get(key[0], ()))
        names = [self._names.setdefault(place, f"{number}/{e}") for e, place in found]
        own = names == [f"{number}/{e}" for e in range(len(names))]
        return None if own else list(names)

    def over(self, forward: OpenForward) -> None:
        """A forward has returned."""
        self.reduce(forward)
        self._following.over(forward.rows, forward.returned)

    def detach(self) -> None:
        """Follow caches and generations no longer."""
        self._following.close()

    def reduce(self, forward: OpenForward) -> None:
        """Turn the blocks of a forward into counts, layers of one kind together."""
        blocks, forward.blocks, forward.held_bytes = forward.blocks, [], 0
        kinds: dict[tuple[Any, ...], list[Pending]] = {}
        for block in blocks:
            try:
                taken = self._take(forward, block)
            except DoesNotFit:
                raise
            except Exception as e:
                forward.problem(_unreadable(block.info, e))
            else:
                if taken is not None:
                    kinds.setdefault(taken.kind, []).append(taken)
        for group in kinds.values():
            info, first = group[0].info, group[0].observed
            assert first.expert_ids_TK is not None
            for p in group:
                if p.observed.changed:
                    forward.problem(f"{p.info.path} changed its routing in place after it was used")
            try:
                # The model's autocast must not reach into our sums.
                with torch.autocast(first.expert_ids_TK.device.type, enabled=False):
                    reduced = reduce(
                        [p.observed for p in group],
                        forward.batches[info.stream],
                        [p.meaning for p in group],
                        info.experts + info.zero_experts,
                        logits=self._keep_logits,
                        faithful=info.faithful,
                        groups=group[0].groups,
                    )
            except Exception as e:
                forward.seen -= len(group)
                forward.problem(_unreadable(info, e), len(group))
                continue
            layers = [
                (p.info, p.observed.capacity, p.observed.capacity_groups, p.times) for p in group
            ]
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

    def _phase(self, going: Going) -> str:
        """train; or prefill and decode, in a generation or with a cache; else eval."""
        if going.phase is not None:
            return going.phase
        if any(m.training for m in self._models):
            return "train"
        if going.cache is None:
            return "eval"
        return "decode" if going.cached else "prefill"

    def _describe(
        self, forward: OpenForward, stream: str, shape: tuple[int, int] | None, seen: Observed
    ) -> Batch:
        ids = _not_none(seen.expert_ids_TK)
        tokens = len(ids) if seen.token_T is None else None
        B, S = batch_shape(forward.inputs, stream, shape, tokens, self._layout)
        leads = stream in ("main", "decoder")  # the others go on with the same sequences
        going = forward.going if leads else Going(past=_past_of(forward, stream))
        mask = forward.inputs.get(
            f"{stream}_attention_mask" if stream == "decoder" else "attention_mask"
        )
        if self._layout == "sb" and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = ~mask if mask.ndim == 4 else mask  # Megatron's is True where nothing attends
        positions = forward.inputs.get(
            "decoder_position_ids" if stream == "decoder" else "position_ids"
        )
        carried = forward.lines
        if stream == "decoder" and forward.inputs.get("encoder_outputs") is not None:
            carried = self._encoded
        given = Given(
            padding=padding_from_mask(mask, B, S, going.past if going.start is None else None),
            mask=mask,
            positions=positions if isinstance(positions, Tensor) else None,
            lengths=packed_lengths(forward.inputs, stream),
            carried=carried,
        )

        def keeps(sequences: NDArray[np.int64]) -> NDArray[np.bool_]:
            return self._sampling.keeps(forward.step, sequences)

        mtp = stream.startswith("mtp")
        context = last_positions(forward.context, S) if mtp else forward.context
        batch, rows = self._describer.describe((B, S), context, given, going, keeps, ids.device)
        if going.problem is not None:
            forward.problem(going.problem)
        if rows is not None:
            forward.lines = rows.lines
        if stream == "encoder":
            self._encoded = forward.lines
        if leads and rows is not None:
            forward.rows = rows
            self._following.goes_on(going, rows)
            rows.add(_routed(forward, batch, going.again, self._layout))
        return batch

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


def _past_of(forward: OpenForward, stream: str) -> int:
    """Positions before a stream that has no cache of its own here."""
    return forward.going.past if stream != "encoder" else 0


def _routed(forward: OpenForward, batch: Batch, again: int, layout: str) -> Routed:
    """What has to be remembered of a forward to say later what became of its tokens."""
    B, S = batch.shape
    owner_T, sequence_N = batch.owners.owner_T, None
    if batch.token_N is not None and isinstance(owner_T, np.ndarray):
        numbers_P = np.array([x.number for x in batch.owners.lines], np.int64)
        sequence_N = numbers_P[owner_T[batch.token_N]]
    return Routed(
        step=forward.step,
        forward=forward.forward,
        shape=(B, max(0, S - again)),
        again=min(again, S),
        layout=layout,
        token_N=batch.token_N,
        sequence_N=sequence_N,
        position_N=batch.position_N,
        padding_T=batch.padding_T,
    )


def _unreadable(info: LayerInfo, error: Exception) -> str:
    """Nothing that we stumble over may end the user's forward."""
    what = f"{type(error).__name__}: {error}"
    return (
        f"{info.path}: what was seen of it could not be read ({what}). Its routing is not recorded"
    )


def _not_none(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _fixed_k(info: LayerInfo, seen: Observed) -> int | None:
    """Choices of every token that is routed; None where it is the router's to say how many."""
    dynamic = seen.chosen_TK is not None and info.top_k is None
    return None if dynamic else _not_none(seen.expert_ids_TK).shape[1]


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

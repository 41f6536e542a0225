"""Passes of another recorder, checked, into a rank of a trace.

L layers of one kind, T tokens, K choices, V outputs of a router (experts, and those that compute
nothing), G tags.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.checks import AlwaysFirst, Ids, as_ids, check_ids, check_weights
from moe_lens.importers.confidence import confidence, sums
from moe_lens.importers.source import Choices, Counted, Pass, Tokens
from moe_lens.trace.events import Forward, LayerCounts, LayerRows, SequenceRow, TokenRows
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import LayerInfo, Meta
from moe_lens.trace.schema import MAX_TAGS, OTHER, UNTAGGED
from moe_lens.trace.writer import TraceWriter

WAITING_BYTES = 64 << 20
"""Per-token rows handed to the writer before it is waited for: none are given up."""

MANY_TAGS = (
    f"more than {MAX_TAGS} tags: further ones are counted as '{OTHER}'; all of them are in the "
    "column `tag` of `sequences`"
)


class RankWriter:
    """Checks the passes of one rank and writes them. Not thread-safe.

    Args:
        run: Folder of the trace.
        meta: Of the rank; its layers say what passes must have.
        path: What is read, for errors.
        tag: Of tokens that have none.

    Raises:
        TraceLocked: A living process writes this rank.
        OSError: The disk refuses.
    """

    def __init__(self, run: Path, meta: Meta, path: str, *, tag: str = UNTAGGED) -> None:
        self.meta = meta
        self.passes = self.tokens = self.token_layers = 0
        self.rows = False
        """Some pass had its tokens one by one."""
        self._path = path
        self._untagged = tag
        self._layers = {info.layer: info for info in meta.layers}
        self._ran: set[int] | None = None
        self._last = (-1, -1)
        self._tags: list[str] = list(meta.tags)
        self._seen: set[int] = set()
        self._always = AlwaysFirst()
        self._weighted = False
        self._handed = 0
        self._lock = RankLock(run, meta.rank)
        try:
            self._writer = TraceWriter(run, meta, queue_bytes=1 << 62)
        except BaseException:
            self._lock.release()
            raise

    def put(self, item: Pass | Counted) -> None:
        """Take the next pass.

        Raises:
            ImportRefused: It is no pass of these layers; says where.
            TraceWriteError: The disk refuses.
        """
        self._in_order(item)
        forward = self._counted(item) if isinstance(item, Counted) else self._pass(item)
        if forward is None:
            return
        self.passes += 1
        self.tokens += int(forward.tokens_G.sum())
        self.token_layers += sum(x.tokens for x in forward.layers)
        self.rows |= forward.sampled
        self._handed += forward.row_bytes
        self._writer.put(forward)
        if self._handed > WAITING_BYTES:
            self.flush()

    def edit(self, change: Callable[[Meta], object]) -> None:
        """Change the meta file, in order with the passes."""
        self._writer.edit(change)

    def flush(self) -> None:
        """Return when all before would survive `kill -9`.

        Raises:
            TraceWriteError: The disk refuses.
        """
        self._writer.flush()
        self._handed = 0

    def close(self, error: BaseException | None = None) -> None:
        """Seal what was taken.

        Args:
            error: What ended it early.

        Raises:
            ImportRefused: What was read was never filled, or breaks an invariant.
            TraceWriteError: The disk refuses.
        """

        def end(meta: Meta) -> None:
            meta.tags = list(self._tags)
            meta.weights = meta.weights if self._weighted else "none"
            meta.attempts[-1].ended_ns = time.time_ns()
            meta.attempts[-1].end = "closed" if error is None else "failed"
            meta.attempts[-1].error = None if error is None else f"{type(error).__name__}: {error}"

        try:
            if self._writer.failed is None:
                self._writer.edit(end)
            self._writer.close()
        finally:
            self._lock.release()
        if error is None:
            self._always.check(self._path)
            if self._writer.breach_count:
                raise ImportRefused(f"{self._path}: {self._writer.take_breaches()[0]}.")

    # -- one pass --------------------------------------------------------------------------------

    def _in_order(self, item: Pass | Counted) -> None:
        where = f"{self._path}: {item.where}"
        if (item.step, item.forward) <= self._last:
            raise ImportRefused(
                f"{where}: step {item.step}, forward {item.forward} after step {self._last[0]}, "
                f"forward {self._last[1]}: passes must be in order, each once."
            )
        self._last = (item.step, item.forward)
        layers = set(item.count_E if isinstance(item, Counted) else item.choices)
        if unknown := layers - set(self._layers):
            raise ImportRefused(f"{where}: there is no layer {min(unknown)}.")
        if self._ran is None:
            self._ran = layers
        if missing := self._ran - layers:
            raise ImportRefused(
                f"{where}: layer {min(missing)} is missing, which ran in the passes before."
            )
        if more := layers - self._ran:
            raise ImportRefused(
                f"{where}: layer {min(more)} ran, which did not in the passes before."
            )

    def _pass(self, item: Pass) -> Forward | None:
        where = f"{self._path}: {item.where}"
        T = _rows(item, where)
        if T == 0:
            return None
        tokens = item.tokens
        if tokens is not None:
            _check_tokens(tokens, T, where)
        tags, tag_T = self._tagged(tokens, T)
        padding_T = tokens.padding_T if tokens is not None else None
        valid_T = np.ones(T, bool) if padding_T is None else ~padding_T
        out = Forward(
            step=item.step,
            forward=item.forward,
            phase=item.phase,
            t_start_ns=item.t_start_ns,
            host_ns=item.host_ns,
            tags=tags,
            tokens_G=np.bincount(tag_T[valid_T], minlength=len(tags)),
            sequences_G=_sequences(tokens, tag_T, valid_T, len(tags)),
            padding_tokens=int((~valid_T).sum()),
            sampled=True,
            fires_expected=len(item.choices),
            fires_seen=len(item.choices),
        )
        for group in self._kinds(item.choices):
            out.layers += self._group(group, item.choices, tag_T, valid_T, len(tags), where)
        out.layers.sort(key=lambda x: x.layer)
        if tokens is not None:
            out.tokens = [_token_rows(tokens, tag_T, valid_T)]
            out.sequences = self._new_sequences(tokens)
        return out

    def _kinds(self, choices: dict[int, Choices]) -> Iterator[list[LayerInfo]]:
        """Layers whose arrays can be looked at together."""
        kinds: dict[tuple[Any, ...], list[LayerInfo]] = {}
        for layer, x in choices.items():
            info = self._layers[layer]
            kind = (info.experts, info.zero_experts, info.top_k, x.ids_TK.shape)
            kinds.setdefault((*kind, x.weights_TK is None), []).append(info)
        yield from kinds.values()

    def _group(
        self,
        infos: list[LayerInfo],
        choices: dict[int, Choices],
        tag_T: NDArray[np.int64],
        valid_T: NDArray[np.bool_],
        G: int,
        where: str,
    ) -> Iterator[LayerCounts]:
        """Counts and rows of layers of one kind, laid out in one array."""
        numbers = [info.layer for info in infos]
        of = [choices[layer] for layer in numbers]
        V = infos[0].experts + infos[0].zero_experts
        dynamic = infos[0].top_k is None
        ids_LTK = np.stack([as_ids(x.ids_TK, where) for x in of])
        check_ids(ids_LTK, V, dynamic=dynamic, layers=numbers, where=where)
        chosen_LTK = ids_LTK >= 0 if dynamic else None
        weights_LTK = None
        if of[0].weights_TK is not None:
            weights_LTK = np.stack([np.asarray(x.weights_TK, np.float32) for x in of])
            if weights_LTK.shape != ids_LTK.shape:
                raise ImportRefused(
                    f"{where}, layer {numbers[0]}: weights of {weights_LTK.shape[1:]} for choices "
                    f"of {ids_LTK.shape[1:]}."
                )
            check_weights(weights_LTK, numbers, where)
            self._weighted = True
        L, T, _ = ids_LTK.shape
        cell_LTK = ids_LTK + (tag_T * V)[None, :, None]
        cell_LTK += (np.arange(L) * (G * V))[:, None, None]
        count_LGV = _count(cell_LTK, valid_T, chosen_LTK, None, L, G, V)
        padding_LGV = None
        if not valid_T.all():
            padding_LGV = _count(cell_LTK, ~valid_T, chosen_LTK, None, L, G, V)
        weight_LGV = None
        if weights_LTK is not None:
            weight_LGV = _count(cell_LTK, valid_T, chosen_LTK, weights_LTK, L, G, V)
        tokens_G = np.bincount(tag_T[valid_T], minlength=G)
        valid = int(tokens_G.sum())
        token_T = np.arange(T, dtype=np.int32)
        for i, (info, x) in enumerate(zip(infos, of, strict=True)):
            self._always.see(info.layer, ids_LTK[i])
            counts = LayerCounts(
                layer=info.layer,
                tokens=valid,
                padding_tokens=T - valid,
                tokens_G=tokens_G,
                routed_GE=count_LGV[i],
                processed_GE=count_LGV[i],
                weight_sum_GE=None if weight_LGV is None else weight_LGV[i],
                padding_GE=None if padding_LGV is None else padding_LGV[i],
                top_k=info.top_k,
            )
            counts.rows = LayerRows(
                token_N=token_T,
                expert_ids_NK=ids_LTK[i],
                weights_NK=None if weights_LTK is None else weights_LTK[i],
                chosen_NK=None if chosen_LTK is None else chosen_LTK[i],
            )
            if x.logits_TE is not None or x.prob_TE is not None:
                _check_outputs(x, T, V, f"{where}, layer {info.layer}")
                _confide(counts, x, info, tag_T, valid_T, G)
            yield counts

    def _tagged(self, tokens: Tokens | None, T: int) -> tuple[list[str], NDArray[np.int64]]:
        """The tags of a pass and the index of each token's; the 33rd of a run is `other`."""
        if tokens is None or tokens.tag_T is None:
            return [self._admit(self._untagged)], np.zeros(T, np.int64)
        admitted = [self._admit(t) for t in tokens.tags]
        tags = list(dict.fromkeys(admitted))
        at = np.array([tags.index(t) for t in admitted], np.int64)
        return tags, at[tokens.tag_T]

    def _admit(self, tag: str) -> str:
        if tag in self._tags:
            return tag
        if len(self._tags) >= MAX_TAGS:
            self._writer.edit(lambda meta: meta.warnings.__setitem__(MANY_TAGS, 1))
            return OTHER
        self._tags.append(tag)
        return tag

    def _new_sequences(self, tokens: Tokens) -> list[SequenceRow]:
        """Rows of the sequences that this pass is the first to have."""
        numbers, first = np.unique(tokens.sequence_T, return_index=True)
        rows = []
        for number, at in zip(numbers.tolist(), first.tolist(), strict=True):
            if number not in self._seen:
                self._seen.add(number)
                at_tag = None if tokens.tag_T is None else int(tokens.tag_T[at])
                tag = self._untagged if at_tag is None else tokens.tags[at_tag]
                rows.append(SequenceRow(number, tag, tokens.request.get(number)))
        return rows

    # -- counts alone ----------------------------------------------------------------------------

    def _counted(self, item: Counted) -> Forward | None:
        where = f"{self._path}: {item.where}"
        tokens = {layer: self._tokens_of(layer, x, where) for layer, x in item.count_E.items()}
        if not any(tokens.values()):
            return None
        most = max(tokens.values())
        out = Forward(
            step=item.step,
            forward=item.forward,
            phase=item.phase,
            t_start_ns=None,
            host_ns=None,
            tags=[self._admit(self._untagged)],
            tokens_G=np.array([most]),
            sequences_G=np.array([0]),
            fires_expected=len(tokens),
            fires_seen=len(tokens),
        )
        for layer, n in sorted(tokens.items()):
            count_GE = item.count_E[layer].astype(np.int64)[None, :]
            out.layers.append(
                LayerCounts(
                    layer=layer,
                    tokens=n,
                    padding_tokens=0,
                    tokens_G=np.array([n]),
                    routed_GE=count_GE,
                    processed_GE=count_GE,
                    weight_sum_GE=None,
                    top_k=self._layers[layer].top_k,
                )
            )
        return out

    def _tokens_of(self, layer: int, count_E: NDArray[Any], where: str) -> int:
        info = self._layers[layer]
        if info.top_k is None:
            raise ImportRefused(f"{where}: counts alone do not say how many tokens: give --top-k.")
        if count_E.shape != (info.experts,):
            raise ImportRefused(
                f"{where}, layer {layer}: counts of {count_E.shape}, not of {info.experts} experts."
            )
        if count_E.min(initial=0) < 0:
            raise ImportRefused(
                f"{where}, layer {layer}: expert {int(count_E.argmin())} has {count_E.min()} "
                "tokens."
            )
        total = int(count_E.sum(dtype=np.int64))
        if total % info.top_k:
            raise ImportRefused(
                f"{where}, layer {layer}: {total:,} choices are no multiple of top-{info.top_k}."
            )
        if int(count_E.max(initial=0)) > total // info.top_k:
            raise ImportRefused(
                f"{where}, layer {layer}: {total // info.top_k:,} tokens of top-{info.top_k}, but "
                f"expert {int(count_E.argmax())} has {int(count_E.max()):,} of them: the top-k is "
                "another."
            )
        return total // info.top_k


def _rows(item: Pass, where: str) -> int:
    """Tokens of a pass, if all its layers have as many."""
    rows = {layer: len(x.ids_TK) for layer, x in item.choices.items()}
    T = max(rows.values(), default=0)
    for layer, n in rows.items():
        if n != T:
            raise ImportRefused(f"{where}, layer {layer}: {n:,} rows, but {T:,} in another layer.")
        if item.choices[layer].ids_TK.ndim != 2:
            raise ImportRefused(
                f"{where}, layer {layer}: ids of {item.choices[layer].ids_TK.shape}, "
                "not of [tokens, top-k]."
            )
    return T


def _check_tokens(tokens: Tokens, T: int, where: str) -> None:
    arrays = {
        "sequence numbers": tokens.sequence_T,
        "positions": tokens.position_T,
        "token ids": tokens.token_id_T,
        "tags": tokens.tag_T,
        "marks of padding": tokens.padding_T,
    }
    for name, x in arrays.items():
        if x is not None and len(x) != T:
            raise ImportRefused(f"{where}: {len(x):,} {name} for {T:,} tokens.")
    if tokens.position_T.min(initial=0) < 0:
        raise ImportRefused(f"{where}: a position is {int(tokens.position_T.min())}.")


def _check_outputs(x: Choices, T: int, V: int, where: str) -> None:
    for name, array in (("logits", x.logits_TE), ("probabilities", x.prob_TE)):
        if array is not None and array.shape != (T, V):
            raise ImportRefused(f"{where}: {name} of {array.shape}, not of {(T, V)}.")


def _count(
    cell_LTK: Ids,
    of_T: NDArray[np.bool_],
    chosen_LTK: NDArray[np.bool_] | None,
    weights_LTK: NDArray[np.float32] | None,
    L: int,
    G: int,
    V: int,
) -> NDArray[Any]:
    """`[L, G, V]`: choices of some tokens, or the sums of their weights."""
    at: Any = slice(None)
    if chosen_LTK is not None:
        at = chosen_LTK & of_T[None, :, None]
    elif not of_T.all():
        at = np.broadcast_to(of_T[None, :, None], cell_LTK.shape)
    weights = None if weights_LTK is None else weights_LTK[at].ravel()
    return np.bincount(cell_LTK[at].ravel(), weights, L * G * V).reshape(L, G, V)


def _sequences(
    tokens: Tokens | None, tag_T: NDArray[np.int64], valid_T: NDArray[np.bool_], G: int
) -> NDArray[np.int64]:
    """Sequences of each tag with a valid token; 0 where they are not known."""
    if tokens is None:
        return np.zeros(G, np.int64)
    pairs = np.unique(np.stack([tag_T, tokens.sequence_T.astype(np.int64)])[:, valid_T], axis=1)
    return np.bincount(pairs[0], minlength=G)


def _token_rows(tokens: Tokens, tag_T: NDArray[np.int64], valid_T: NDArray[np.bool_]) -> TokenRows:
    T = len(tag_T)
    ids = tokens.token_id_T
    return TokenRows(
        stream="main",
        token_N=np.arange(T, dtype=np.int32),
        sequence_N=np.asarray(tokens.sequence_T, np.int64),
        position_N=np.asarray(tokens.position_T, np.int32),
        padding_N=~valid_T,
        tag_N=tag_T.astype(np.int32),
        # -1 becomes null: of this token the id is not known.
        token_id_N=None if ids is None else np.ma.masked_less(np.asarray(ids, np.int32), 0),
    )


def _confide(
    counts: LayerCounts,
    x: Choices,
    info: LayerInfo,
    tag_T: NDArray[np.int64],
    valid_T: NDArray[np.bool_],
    G: int,
) -> None:
    """Add what logits or a distribution say."""
    rows = counts.rows
    assert rows is not None
    said = confidence(x, rows.expert_ids_NK, info.score)
    if x.logits_TE is not None:
        rows.logits_NE = np.asarray(x.logits_TE, np.float32)
        finite_T = np.isfinite(rows.logits_NE).all(1)
        counts.nonfinite_G = np.bincount(tag_T[valid_T & ~finite_T], minlength=G)
    if said.entropy_T is not None and said.prob_TV is not None:
        rows.entropy_N = said.entropy_T.astype(np.float32)
        V = said.prob_TV.shape[1]
        prob_TV = np.where(np.isfinite(said.prob_TV), said.prob_TV, 0)
        prob_GV = np.zeros((G, V))
        np.add.at(prob_GV, tag_T[valid_T], prob_TV[valid_T])
        counts.prob_sum_GE = prob_GV
    if said.margin_T is not None:
        rows.margin_N = said.margin_T.astype(np.float32)
        rows.next_ids_NM = said.next_ids_T1
    for name, values_T in (
        ("entropy_sum_G", said.entropy_T),
        ("top1_prob_sum_G", said.top1_T),
        ("zloss_sum_G", said.zloss_T),
        ("margin_sum_G", said.margin_T),
    ):
        at_valid = None if values_T is None else values_T[valid_T]
        setattr(counts, name, sums(at_valid, tag_T[valid_T], G))

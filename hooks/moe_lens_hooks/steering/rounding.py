"""One model, looked at with its own weights and with rounded ones: the rows of `precision`.

Legend: B sequences, S positions, T = B S tokens of a piece, K choices per token, E experts, N
tokens of a piece that have a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_lens.errors import SteeringError, UnsupportedRouter
from moe_lens.trace.precision import PRECISION
from moe_lens_hooks.semantics import probabilities
from moe_lens_hooks.steering.change import Base
from moe_lens_hooks.steering.fake_quant import Format
from moe_lens_hooks.steering.looked import Looked, Looking
from moe_lens_hooks.steering.matrices import Weights, each_once
from moe_lens_hooks.steering.passes import Passes, same
from moe_lens_hooks.steering.quantised import Plan, Quantised
from moe_lens_hooks.steering.token_losses import Batch, take

Part = Literal["router", "experts", "both"]
PARTS: tuple[Part, ...] = get_args(Part)

Columns = dict[str, Any]
Measure = Callable[[], Columns]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class RoundedLayer:
    """What a layer multiplies with: the weights of its router, and of its experts."""

    router: list[Weights]
    experts: list[Weights]

    def of(self, part: Part) -> list[Weights]:
        """Those of a part, tied ones once."""
        router = self.router if part != "experts" else []
        return each_once([*router, *(self.experts if part != "router" else [])])


@dataclass(frozen=True)
class _Piece:
    """Sequences that run together, and what the model does with them as it is."""

    batch: Batch
    sequences_B: NDArray[np.int64]
    tags_B: NDArray[np.str_]
    loss_BS: Tensor
    layers: list[Looked]
    marks: dict[int, tuple[float, ...]]

    @property
    def tokens_N(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(row, position) of the tokens that have a loss."""
        row_N, position_N = np.nonzero(self.loss_BS.isfinite().numpy())
        return row_N, position_N


class Rounding:
    """Measures a model with rounded weights.

    Args:
        model: The model.
        passes: Runs it.
        layers: What is rounded, by number in call order.
        formats: To what.
        parts: Of which weights.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: Passes,
        layers: Mapping[int, RoundedLayer],
        formats: Sequence[Format],
        parts: Sequence[Part],
    ) -> None:
        self._model, self._passes, self._layers = model, passes, layers
        self._formats, self._asked = formats, parts

    def parts_of(self, bases: Sequence[Base]) -> int:
        """How many parts there will be."""
        pieces = sum(len(base.pieces) for base in bases)
        each = len(self._layers) + 2
        return 1 + pieces * len(self._formats) * len(self._asked) * each

    def parts(self, bases: Sequence[Base]) -> Iterator[tuple[str, Measure]]:
        """What is measured, in words, and what measures it.

        Raises:
            UnsupportedRouter: The model does not repeat its output bit for bit with its own choices
                forced; or the weights that were found are not those that a layer computes with.
        """
        yield "weights", lambda: _joined(list(self._weights(bases)))
        first = 0
        for base in bases:
            for rows in base.pieces:
                piece = self._look(base, rows, first)
                yield from self._parts_of_piece(piece)
            first += len(base.tags_B)

    def _parts_of_piece(self, piece: _Piece) -> Iterator[tuple[str, Measure]]:
        for to in self._formats:
            for part in self._asked:
                says = f"{to.name}, {part}"
                for n in self._layers:
                    yield f"{says}: layer {n}", partial(self._alone, piece, to, part, n)
                for mode in ("forced", "free"):
                    yield f"{says}: {mode}", partial(self._all, piece, to, part, mode)

    def _look(self, base: Base, rows: Tensor, first: int) -> _Piece:
        """What a piece does as it is; the self-test of what comes."""
        batch = take(base.inputs, rows)
        with self._rounded({}, None) as own:
            loss, outputs, layers = self._passes.looked(batch, Looking(self._layers))
        at = rows.numpy()
        piece = _Piece(batch, at + first, base.tags_B[at], loss, layers, own.marks)
        with self._rounded({}, None):
            held, again, _ = self._passes.looked(batch, Looking(held=layers, learns=False))
        before = torch.from_numpy(base.loss_BS[at])
        if not same([before, loss, *outputs], [loss, held, *again]):
            raise UnsupportedRouter(
                f"{type(self._model).__name__}: giving it the experts that it chose does not "
                "reproduce its output bit for bit, so that what rounding does cannot be told from "
                "noise. Does it draw at random, or keep a state? Call model.eval()."
            )
        return piece

    def _rounded(self, plan: Plan, to: Format | None) -> Quantised:
        return Quantised(self._passes.layers, plan, to)

    def _alone(self, piece: _Piece, to: Format, part: Part, n: int) -> Columns:
        """One layer rounded; all that comes before it is as it was."""
        with self._rounded({n: self._layers[n].of(part)}, to) as quantised:
            loss, _, layers = self._passes.looked(piece.batch, Looking({n}, learns=False))
        if quantised.differs.get(n, False):
            self._check_used(piece, part, n, layers[n], quantised.marks)
        return _rows(piece, to, part, "alone", n, loss, layers[n], layers[n].ids_TK)

    def _all(self, piece: _Piece, to: Format, part: Part, mode: str) -> Columns:
        """All layers rounded, each given what it chose before, or not."""
        plan = {n: layer.of(part) for n, layer in self._layers.items()}
        held = piece.layers if mode == "forced" else None
        with self._rounded(plan, to):
            looking = Looking(self._layers, held, learns=False)
            loss, _, layers = self._passes.looked(piece.batch, looking)
        return _joined(
            [
                _rows(piece, to, part, mode, n, loss, layers[n], _chosen(layers[n], held))
                for n in self._layers
            ]
        )

    def _check_used(
        self, piece: _Piece, part: Part, n: int, now: Looked, marks: Mapping[int, Any]
    ) -> None:
        """Raise if the weights that were rounded are not those that the layer computes with."""
        before = piece.layers[n]
        unused = part != "router" and marks.get(n) == piece.marks.get(n)
        if part == "router" and before.logits_TE is not None and now.logits_TE is not None:
            unused = torch.equal(before.logits_TE, now.logits_TE)
        if unused:
            raise UnsupportedRouter(
                f"layer {n} ({now.layer.info.path}) gives the same with other weights of its "
                f"{'router' if part == 'router' else 'experts'}: it computes with copies of them, "
                "or they do not matter. Leave it out with layers=."
            )

    def _weights(self, bases: Sequence[Base]) -> Iterator[Columns]:
        """How far rounding moves weights: a row a router, and an expert."""
        for to in self._formats:
            for n, layer in self._layers.items():
                usage_E = _usage(bases, n)
                info = bases[0].layers[n].info
                moved = _Moved(to, info.experts)
                try:
                    for weights in layer.router:
                        moved.add("router", weights)
                    for weights in layer.experts:
                        moved.add("experts", weights)
                except SteeringError as e:
                    raise SteeringError(f"layer {n} ({info.path}): {e}") from e
                yield moved.columns(n, usage_E)


def _chosen(now: Looked, held: Sequence[Looked] | None) -> Tensor | None:
    """What a router chose; None: it was overruled, and nobody knows."""
    return now.ids_TK if held is None else now.own_TK


def _rows(
    piece: _Piece,
    to: Format,
    part: Part,
    mode: str,
    n: int,
    loss_BS: Tensor,
    now: Looked,
    chosen_TK: Tensor | None,
) -> Columns:
    """A row for each token that has a loss."""
    before = piece.layers[n]
    row_N, position_N = piece.tokens_N
    at_N = row_N * piece.loss_BS.shape[1] + position_N
    N = len(row_N)
    agreement_T = agreement(before.ids_TK, chosen_TK)
    return _blank(N) | {
        "format": [to.name] * N,
        "part": [part] * N,
        "mode": [mode] * N,
        "layer": np.full(N, n),
        "sequence": piece.sequences_B[row_N],
        "position": position_N,
        "tag": piece.tags_B[row_N].tolist(),
        "base_loss": piece.loss_BS.numpy()[row_N, position_N],
        "loss": loss_BS.numpy()[row_N, position_N],
        "agreement": agreement_T[at_N],
        "kl": divergence(before.logits_TE, now.logits_TE, before.score, len(agreement_T))[at_N],
        "margin": before.margin_T.numpy()[at_N],
    }


def agreement(before_TK: Tensor, now_TK: Tensor | None) -> Floats:
    """|S ∩ S'| / k of each token; NaN where the choice is not known."""
    if now_TK is None:
        return np.full(len(before_TK), np.nan)
    both_TK = (before_TK.unsqueeze(-1) == now_TK.unsqueeze(-2)).any(-1)
    share: Floats = both_TK.double().mean(-1).numpy()
    return share


def divergence(
    before_TE: Tensor | None, now_TE: Tensor | None, score: str | None, tokens: int
) -> Floats:
    """KL(p || q) of each token's distributions, nats; NaN where they are not known."""
    if before_TE is None or now_TE is None or score is None:
        return np.full(tokens, np.nan)
    p_TE, q_TE = (probabilities(x.double(), score) for x in (before_TE, now_TE))
    each_TE = torch.special.xlogy(p_TE, p_TE) - torch.special.xlogy(p_TE, q_TE)
    sums: Floats = each_TE.sum(-1).clamp_min(0).numpy()  # below zero by rounding alone
    return sums


def _usage(bases: Sequence[Base], n: int) -> Floats:
    """Share of the tokens that have a loss that choose each expert, `[E]`."""
    info = bases[0].layers[n].info
    ids_NK = np.concatenate([base.layers[n].expert_ids_BSK[base.tokens] for base in bases])
    counts = np.bincount(ids_NK.reshape(-1), minlength=info.experts + info.zero_experts)
    share: Floats = counts / len(ids_NK)
    return share


class _Moved:
    """What a format does to the weights of a layer; zero-compute experts have none."""

    def __init__(self, to: Format, experts: int) -> None:
        self._to, self._experts = to, experts
        self._sums: dict[tuple[str, int | None], list[float]] = {}

    def add(self, part: str, weights: Weights) -> None:
        """Add what happens to these."""
        for expert, matrix in weights.matrices()[: self._experts]:
            exact, size = matrix.double(), self._sums.setdefault((part, expert), [0.0, 0.0, 0.0])
            moved = self._to.rounded(matrix).double() - exact
            size[0] += float(moved.square().sum())
            size[1] += float(exact.square().sum())
            spread = float(exact.std(correction=0))
            size[2] = max(size[2], float(exact.abs().max()) / spread if spread else 0.0)

    def columns(self, n: int, usage_E: Floats) -> Columns:
        """A row a router and expert."""
        N = len(self._sums)
        return _blank(N) | {
            "format": [self._to.name] * N,
            "part": [part for part, _ in self._sums],
            "mode": ["weights"] * N,
            "layer": np.full(N, n),
            "expert": [expert for _, expert in self._sums],
            "error": np.array([a / b if b else 0.0 for a, b, _ in self._sums.values()]),
            "outlier": np.array([most for *_, most in self._sums.values()]),
            "usage": np.array([np.nan if e is None else usage_E[e] for _, e in self._sums]),
        }


def _blank(rows: int) -> Columns:
    """Every column, without a value."""
    return {c.name: [None] * rows for c in PRECISION.columns}


def _joined(parts: list[Columns]) -> Columns:
    return {name: [x for part in parts for x in part[name]] for name in parts[0]}

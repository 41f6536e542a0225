"""Realistic skewed routing, as the trace writer gets it: what the other benchmarks write.

Selection scores of a token are the sum of four parts, all seeded:

- popularity: a Zipf law over the experts of a layer, in an order of its own
- domain: each domain likes other experts, more so in later layers
- token type: tokens are of Zipf-distributed types, each with its own experts, less so in later
  layers
- request: an AR(1) process along the positions of a request, so that neighbours agree

The k best of E are chosen. Weights are the softmax renormalised over the chosen, entropy is that of
the full distribution, margin the score of the k-th minus that of the next.

    python benchmarks/routing_generator.py [--quick]

prints how skewed the routing is: the largest load over the mean, the share of the most loaded tenth
of the experts, and how many experts two neighbouring tokens have in common. No gate.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from _common import Report, is_quick, table
from numpy.typing import NDArray

from moe_lens.trace.events import Forward, LayerCounts, LayerRows, SequenceRow, TokenRows

START_NS = 1_750_000_000_000_000_000


@dataclass(frozen=True)
class Shape:
    """What is generated; the defaults are a large model's.

    Attributes:
        requests: Requests (sequences) in a forward, each of one domain.
        positions: Tokens of each request in a forward.
        domains: Tags; 0: one tag, and the domains still differ.
    """

    layers: int = 48
    experts: int = 128
    top_k: int = 8
    requests: int = 16
    positions: int = 256
    domains: int = 6
    token_types: int = 512
    tagged: bool = False
    seed: int = 2026

    @property
    def tokens(self) -> int:
        """Tokens in a forward."""
        return self.requests * self.positions

    def described(self) -> dict[str, object]:
        """For a result file."""
        return {"generator": "benchmarks/routing_generator.py", **asdict(self)}


class RoutingGenerator:
    """Forwards with counts and rows, one at a time; the same ones for the same shape.

    Legend: T tokens, E experts, K choices, N = T rows, G tags.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = s = shape
        g = np.random.default_rng(s.seed)
        ranks = np.log(np.arange(1, s.experts + 1))
        # Zipf exponents that grow with depth: later layers are more skewed.
        depth = np.linspace(0.0, 1.0, s.layers)
        self._popular = np.stack([-(0.35 + 0.25 * d) * g.permutation(ranks) for d in depth]).astype(
            np.float32
        )
        like = (s.layers, s.domains, s.experts)
        self._domain = _scaled(g.standard_normal(like), 0.3 + 0.5 * depth)
        like = (s.layers, s.token_types, s.experts)
        self._type = _scaled(g.standard_normal(like), 0.9 - 0.4 * depth)
        types = 1.0 / np.arange(1, s.token_types + 1)
        self._type_share = types / types.sum()
        self._rho = (0.5 + 0.35 * depth).astype(np.float32)

    def forwards(self, n: int, *, rows: bool = True, first_step: int = 0) -> Iterator[Forward]:
        """`n` forwards of one step each, in training; the numbers depend on the step alone."""
        for step in range(first_step, first_step + n):
            yield self.forward(step, rows=rows)

    def forward(self, step: int, *, rows: bool = True) -> Forward:
        """The forward of one step, made anew at every call."""
        s = self.shape
        g = np.random.default_rng([s.seed, step])
        domain_B = g.integers(0, s.domains, s.requests)
        type_T = g.choice(s.token_types, s.tokens, p=self._type_share)
        domain_T = np.repeat(domain_B, s.positions)
        tags = [f"domain{i}" for i in range(s.domains)] if s.tagged else ["untagged"]
        tag_T = domain_T if s.tagged else np.zeros(s.tokens, np.int64)
        token_T = np.arange(s.tokens, dtype=np.int32)
        whole = Forward(
            step=step,
            forward=0,
            phase="train",
            t_start_ns=START_NS + step * 1_000_000_000,
            host_ns=int(g.integers(700_000_000, 900_000_000)),
            tags=tags,
            tokens_G=np.bincount(tag_T, minlength=len(tags)),
            sequences_G=np.bincount(domain_B if s.tagged else 0 * domain_B, minlength=len(tags)),
            sampled=rows,
            fires_expected=s.layers,
            fires_seen=s.layers,
        )
        for layer in range(s.layers):
            score_TE = self._popular[layer] + self._domain[layer][domain_T]
            score_TE += self._type[layer][type_T]
            score_TE += self._requests(g, layer)
            whole.layers.append(self._layer(layer, score_TE, tag_T, len(tags), token_T, rows))
        if rows:
            whole.tokens = [
                TokenRows(
                    stream="main",
                    token_N=token_T,
                    sequence_N=np.repeat(step * s.requests + np.arange(s.requests), s.positions),
                    position_N=np.tile(np.arange(s.positions, dtype=np.int32), s.requests),
                    padding_N=np.zeros(s.tokens, bool),
                    tag_N=tag_T.astype(np.int32),
                )
            ]
            whole.sequences = [
                SequenceRow(step * s.requests + i, tags[domain_B[i] if s.tagged else 0])
                for i in range(s.requests)
            ]
        return whole

    def _requests(self, g: np.random.Generator, layer: int) -> NDArray[np.float32]:
        """AR(1) along the positions of each request, of unit variance: `[T, E]`."""
        s, rho = self.shape, self._rho[layer]
        x = g.standard_normal((s.positions, s.requests, s.experts), dtype=np.float32)
        x[1:] *= np.sqrt(1 - rho * rho)
        for i in range(1, s.positions):
            x[i] += rho * x[i - 1]
        return x.transpose(1, 0, 2).reshape(s.tokens, s.experts)

    def _layer(
        self,
        layer: int,
        score_TE: NDArray[np.float32],
        tag_T: NDArray[np.int64],
        tags: int,
        token_T: NDArray[np.int32],
        rows: bool,
    ) -> LayerCounts:
        s = self.shape
        T, E, K = s.tokens, s.experts, s.top_k
        best_TK1 = np.argpartition(score_TE, E - K - 1, axis=1)[:, E - K - 1 :]
        by_rank = np.argsort(-np.take_along_axis(score_TE, best_TK1, 1), axis=1)
        best_TK1 = np.take_along_axis(best_TK1, by_rank, 1)
        top = np.take_along_axis(score_TE, best_TK1[:, :1], 1)
        p_TE = np.exp(score_TE - top)
        z_T1 = p_TE.sum(1, keepdims=True)
        p_TE /= z_T1
        lse_T = (top + np.log(z_T1))[:, 0]
        p_TK1 = np.take_along_axis(p_TE, best_TK1, 1)
        chosen = p_TK1[:, :K].sum(1, keepdims=True)
        weights_TK = p_TK1[:, :K] / chosen
        entropy_T = lse_T - (p_TE * score_TE).sum(1)
        z_TK1 = np.take_along_axis(score_TE, best_TK1, 1)
        margin_T = z_TK1[:, K - 1] - z_TK1[:, K]
        ids_TK = best_TK1[:, :K]
        cell_TK = tag_T[:, None] * E + ids_TK
        routed = np.bincount(cell_TK.ravel(), minlength=tags * E).reshape(tags, E)
        weight = np.bincount(cell_TK.ravel(), weights_TK.ravel(), minlength=tags * E)
        group = np.eye(tags)[:, tag_T]  # [G, T]: who is of which tag
        counts = LayerCounts(
            layer=layer,
            tokens=T,
            padding_tokens=0,
            tokens_G=np.bincount(tag_T, minlength=tags),
            routed_GE=routed,
            processed_GE=routed.copy(),
            weight_sum_GE=weight.reshape(tags, E),
            prob_sum_GE=group @ p_TE,
            entropy_sum_G=group @ entropy_T,
            margin_sum_G=group @ margin_T,
            top1_prob_sum_G=group @ p_TK1[:, 0],
            zloss_sum_G=group @ (lse_T.astype(np.float64) ** 2),
            top_k=K,
        )
        if rows:
            counts.rows = LayerRows(
                token_N=token_T,
                expert_ids_NK=ids_TK.astype(np.int32),
                weights_NK=weights_TK,
                next_ids_NM=best_TK1[:, K:].astype(np.int32),
                next_weights_NM=p_TK1[:, K:] / chosen,
                entropy_N=entropy_T,
                margin_N=margin_T,
            )
        return counts


def _scaled(x: NDArray[np.float64], by_L: NDArray[np.float64]) -> NDArray[np.float32]:
    return (x * by_L[:, None, None]).astype(np.float32)


def skew(forward: Forward) -> dict[str, tuple[float, float]]:
    """How skewed a forward's routing is: each figure's least and greatest over the layers."""
    found: dict[str, list[float]] = {}
    for x in forward.layers:
        assert x.rows is not None
        load_E = np.sort(x.routed_GE.sum(0))[::-1]
        E = len(load_E)
        ids_NK = x.rows.expert_ids_NK
        common = (ids_NK[1:, :, None] == ids_NK[:-1, None, :]).sum((1, 2)) / ids_NK.shape[1]
        figures = {
            "largest load / mean": load_E[0] / load_E.mean(),
            "share of the top tenth": load_E[: round(E / 10)].sum() / load_E.sum(),
            "overlap of neighbours": common.mean(),
            "entropy / ln E": x.rows.entropy_N.mean() / np.log(E),  # type: ignore[union-attr]
            "largest weight, mean": x.rows.weights_NK[:, 0].mean(),
            "margin, mean": x.rows.margin_N.mean(),  # type: ignore[union-attr]
        }
        for name, value in figures.items():
            found.setdefault(name, []).append(float(value))
    return {name: (min(v), max(v)) for name, v in found.items()}


def main() -> int:
    quick = is_quick(__doc__)
    shape = Shape(positions=64) if quick else Shape()
    numbers = skew(RoutingGenerator(shape).forward(0))
    table(
        ["over the layers", "least", "greatest"],
        [[name, f"{low:.3f}", f"{high:.3f}"] for name, (low, high) in numbers.items()],
    )
    return Report("routing_generator", shape.described(), (), numbers).finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())

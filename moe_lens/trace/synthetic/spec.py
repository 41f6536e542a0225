"""What a synthetic trace is made of. Whether that can be, `checks` says."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lens.trace.synthetic import plants
from moe_lens.trace.synthetic.checks import check
from moe_lens.trace.synthetic.plants import Coins, Plant


@dataclass(frozen=True)
class Domain:
    """A kind of text: the tag of its sequences, and how they are drawn."""

    name: str
    share: float = 1.0
    """Of the sequences; shares are divided by their sum."""
    vocabulary: int = 512
    """Token ids 0 to vocabulary - 1, each domain with frequent ids of its own."""
    zipf: float = 1.0
    """The r-th most frequent id has a probability in proportion to r ** -zipf."""


@dataclass(frozen=True)
class Drift:
    """Popularity is dealt out to the experts anew, at stated forwards (numbers in the run)."""

    at: tuple[int, ...]
    linear: bool = False
    """From one forward of `at` to the next the rates move in a straight line; else they jump."""


@dataclass(frozen=True)
class Burst:
    """Every `every`-th forward one expert is hot, chosen by `share` of the tokens.

    Another one each time, in each layer: all experts that are not planted have their turn before
    one has its second.
    """

    share: float
    every: int = 1


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A synthetic trace. As it stands nothing is planted: what a metric finds in it is noise."""

    layers: int = 2
    experts: int = 16
    top_k: int = 2
    steps: int = 8
    forwards: int = 1
    """Forwards of a step in training and evaluation, each of sequences of its own."""
    sequences: int = 8
    """In a forward, on each rank."""
    length: int = 64
    """Tokens of each; in serving, of the prompt."""
    phases: tuple[str, ...] = ("train",)
    """Of the steps, in turns: train, eval, or serve: a prefill forward, then `decode` forwards of
    one token of each of the same sequences."""
    decode: int = 16
    domains: tuple[Domain, ...] = (
        Domain("code"),
        Domain("prose"),
        Domain("maths"),
        Domain("dialogue"),
    )
    domain_strength: float = 0.0
    """Standard deviation of what a domain adds to the logits, by expert and layer."""
    topics: int = 1
    stay: float = 0.9
    """Probability that a token keeps its predecessor's topic; else a topic is drawn at random."""
    topic_strength: float = 0.0
    """Standard deviation of what a topic adds to the logits."""
    context_independence: float = 0.0
    """1: the token id alone decides, routing is a lookup table; 0: it has no part in it."""
    popularity: str = "uniform"
    """How the experts' rates are distributed: uniform, zipf (rank ** -skew), lognormal
    (exp(skew * normal)); in each layer dealt out in another order."""
    skew: float | tuple[float, ...] = 1.0
    """Of all layers, or layer by layer."""
    planted: tuple[Plant, ...] = ()
    drift: Drift | None = None
    burst: Burst | None = None
    capacity_factor: float | None = None
    """An expert takes ceil(factor * T * k / E) choices of a forward of a rank, those of the first
    tokens; None: dropless."""
    ranks: int = 1
    """Data-parallel ranks, each with sequences of its own."""
    rows: bool = True
    """Per-token rows are written."""
    logits: bool = False
    """The router's logits are written too."""
    losses: bool = False
    """Losses in training and evaluation: those of a model that knows the frequencies of a domain's
    token ids and no more. Their mean is the entropy of these frequencies."""
    hidden_size: int | None = 256
    intermediate_size: int | None = 128
    groups: int | None = None
    """Groups of experts in the model card; a token may choose from all of them."""
    pairs: int = 0
    """Blocks: of every two sequences of a forward the second is the first again, its `length`
    tokens cut into so many equal blocks in the reverse order (1: the same again). They share a
    value of the key `pair`, with the variants a and b. 0: none."""
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each domain in the tokens."""
        total = sum(d.share for d in self.domains)
        return {d.name: d.share / total for d in self.domains}

    def coins(self, layer: int) -> Coins:
        """The coins of what is planted in a layer, bursts apart."""
        here = plants.here(self.planted, layer)
        return plants.coins(here, self.top_k, self.experts, self.shares)

    def skew_of(self, layer: int) -> float:
        return self.skew[layer] if isinstance(self.skew, tuple) else self.skew

"""What a synthetic trace holds, known before anybody looks at it.

F forwards, L layers, E experts, G domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace.synthetic import plants
from moe_lens.trace.synthetic.expected import Expected, expected
from moe_lens.trace.synthetic.plants import P
from moe_lens.trace.synthetic.router import Routers
from moe_lens.trace.synthetic.schedule import Moment, Sequences
from moe_lens.trace.synthetic.spec import Spec


@dataclass(frozen=True)
class Truth:
    """What was planted, and what must be found.

    Attributes:
        spec: The spec it was made from.
        moments: The forwards, in the order of `counts_FLE`.
        counts_FLE: Choices of each expert, forward by forward, exactly those written; all ranks
            together.
    """

    spec: Spec
    moments: tuple[Moment, ...]
    counts_FLE: NDArray[np.int64]

    def planted(self, kind: type[P], layer: int) -> list[P]:
        """What of one kind (Hot, Dead, Pair, Committee, Specialist) is planted in a layer."""
        here = plants.here(self.spec.planted, layer)
        return [p for p in here if isinstance(p, kind)]

    @property
    def change_points(self) -> tuple[int, ...]:
        """Forwards from which on popularity is another; none where it moves in a straight line."""
        drift = self.spec.drift
        if drift is None or drift.linear:
            return ()
        return tuple(f for f in drift.at if f < len(self.moments))

    @property
    def bursts_FL(self) -> NDArray[np.int64]:
        """The expert that is hot in this forward alone; -1: none."""
        routers = Routers(self.spec)
        layers = range(self.spec.layers)
        return np.array([[routers.burst(i, m.index) for i in layers] for m in self.moments])

    @property
    def loss_G(self) -> dict[str, float]:
        """Mean loss of each domain, nats, where losses were written."""
        losses = Sequences(self.spec).loss_G.tolist()
        return dict(zip(self.spec.shares, losses, strict=True))

    def expected(self, index: int = 0) -> Expected:
        """Probability that a token of forward `index` chooses each expert.

        The same in all forwards without drift and bursts.
        """
        return expected(Routers(self.spec), index)

"""What an all-to-all takes: a latency, and the bytes of the busiest rank or node.

t = latency + max(bytes of the busiest rank / bandwidth of a rank,
                  bytes of the busiest node / (bandwidth of a rank's network card * its ranks))

The busiest rank is the one that sends or receives most, wherever to: what crosses the network is
forwarded within a node over the same links. Combine sends the same rows back, so its matrix is that
of dispatch transposed.

R ranks, N nodes. Bytes that stay on a rank, or node, are not sent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay.machine import slug
from moe_lens.runtime.cuda.compiler import cache_folder

LITERATURE = "literature"
KIND = "moe_lens all-to-all"


@dataclass(frozen=True)
class Link:
    """How quick an all-to-all is.

    Attributes:
        name: Of the preset, or of the file.
        label: "literature", or the backend that was measured.
        latency_s: What it takes with hardly a byte.
        bytes_per_s: Of one rank, one way.
        network_bytes_per_s: Of one rank's share of what its node sends to others; None: unknown.
        source: Where the numbers come from.
    """

    name: str
    label: str
    latency_s: float
    bytes_per_s: float
    network_bytes_per_s: float | None
    source: str

    def seconds(self, bytes_RR: NDArray[Any], bytes_NN: NDArray[Any] | None = None) -> float:
        """Time of one all-to-all; 0 where nothing is sent.

        Args:
            bytes_RR: From each rank to each.
            bytes_NN: From each node to each, where there are several.

        Raises:
            ReplayError: There are several nodes, and the bandwidth between them is not known.
        """
        most = busiest(bytes_RR)
        if not most:
            return 0.0
        taken = most / self.bytes_per_s
        if bytes_NN is not None and len(bytes_NN) > 1:
            if self.network_bytes_per_s is None:
                raise ReplayError(
                    f"the all-to-all {self.name} is of one node: it does not say how quick the "
                    "network between nodes is. Take another with --all-to-all."
                )
            per_node = len(bytes_RR) // len(bytes_NN)
            taken = max(taken, busiest(bytes_NN) / (self.network_bytes_per_s * per_node))
        return self.latency_s + taken


def busiest(bytes_BB: NDArray[Any]) -> int:
    """What the busiest rank, or node, sends or receives."""
    away = bytes_BB - np.diag(np.diag(bytes_BB))
    return int(max(away.sum(axis=0).max(), away.sum(axis=1).max()))


PRESETS = {
    link.name: link
    for link in (
        Link(
            "h800",
            LITERATURE,
            0.0,
            153e9,
            43e9,
            "DeepEP V1, docs/legacy.md, normal kernels on H800: dispatch within a node of 8 at "
            "153 GB/s of about 160 (NVLink), over CX7 at 43 GB/s a rank of about 50 (16 ranks). "
            "It gives no latency, so small batches come out too quick",
        ),
        Link(
            "b200",
            LITERATURE,
            0.0,
            726e9,
            43e9,
            "DeepEP V2, README.md, SM100: dispatch within a node of 8 at 726 GB/s (NVLink); the "
            "network is CX7 as in h800. It gives no latency, so small batches come out too quick",
        ),
        Link(
            "h800-low-latency",
            LITERATURE,
            38e-6,
            192e9,
            None,
            "DeepEP V1, docs/legacy.md, low-latency kernels on 8 ranks of H800, 128 tokens of "
            "7,168, top-8: the line through its dispatch (fp8, 77 us) and its combine (bfloat16, "
            "114 us), every choice sent",
        ),
    )
}
"""By name. All of them are numbers of others, on machines of others."""


def fit_path(device_name: str, ranks: int, backend: str) -> Path:
    """Where the fit of so many ranks of this machine is kept."""
    name = slug(f"{device_name} {ranks} ranks {backend}")
    return cache_folder() / "all-to-all" / f"{name}.json"


def link_of(asked: str | None, *, device_name: str, ranks: int, nodes: int) -> Link:
    """The all-to-all to compute with.

    Args:
        asked: A preset, or the path of a fit that `moe-lens machine --all-to-all` kept. None: the
            fit of this machine over NCCL for so many ranks on one node, otherwise h800.
        device_name: Of this machine.
        ranks: R.
        nodes: N.

    Raises:
        ReplayError: No such preset or file, or one that does not know the network it would need.
    """
    if asked is None:
        own = fit_path(device_name, ranks, "nccl")
        link = read_link(own) if nodes == 1 and own.exists() else PRESETS["h800"]
    elif asked.lower() in PRESETS:
        link = PRESETS[asked.lower()]
    elif Path(asked).suffix == ".json" or Path(asked).exists():
        link = read_link(Path(asked))
    else:
        raise ReplayError(
            f"no all-to-all is called {asked!r}: it is one of {', '.join(PRESETS)}, or the file of "
            "a fit (moe-lens machine --all-to-all makes one)."
        )
    if nodes > 1:
        two = np.ones((2, 2), np.int64)
        link.seconds(two, two)  # raises where the network is not known
    return link


def read_link(path: Path) -> Link:
    """A fit that was kept.

    Raises:
        ReplayError: Not such a file.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["kind"] != KIND:
            raise KeyError("kind")
        network = raw.get("network_bytes_per_s")
        link = Link(
            path.name,
            str(raw["backend"]),
            float(raw["latency_s"]),
            float(raw["bytes_per_s"]),
            None if network is None else float(network),
            str(raw["note"]),
        )
    except OSError as e:
        raise ReplayError(f"{path} cannot be read ({e.strerror or e}).") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ReplayError(
            f"{path} is not a fit that moe-lens machine --all-to-all kept "
            f"({type(e).__name__}: {e})."
        ) from e
    if link.latency_s < 0 or not link.bytes_per_s > 0:
        raise ReplayError(f"{path}: a latency below 0, or a bandwidth of 0.")
    return link

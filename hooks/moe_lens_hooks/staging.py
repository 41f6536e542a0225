"""From the device to the host without making the model wait.

On a CUDA device the copies run on a stream of their own into pinned memory; whoever reads them (the
trace writer's thread) waits for their event, and the tensors are held until then. On a CPU there is
nothing to copy.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_streams: dict[torch.device, torch.cuda.Stream] = {}


class HostCopy:
    """Tensors on their way to the host."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._source = tensors
        self._host = tensors
        self._landed: torch.cuda.Event | None = None
        device = next((t.device for t in tensors if t.device.type == "cuda"), None)
        if device is not None:
            side = _streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self._host = [t.to("cpu", non_blocking=True) for t in tensors]
                self._landed = side.record_event()

    def arrays(self) -> list[NDArray[Any]]:
        """Wait until they have landed; numpy arrays in the order given."""
        if self._landed is not None:
            self._landed.synchronize()
        self._source = []
        return [t.numpy() for t in self._host]

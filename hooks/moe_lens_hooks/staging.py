"""Between device and host without making the model wait.

On a CUDA device numbers leave on a stream of their own, into pinned memory, behind what the model's
stream had queued by then; whoever reads them (the trace writer's thread) waits for their event. The
tensors are held until then, so that nothing writes where a copy still reads. On a CPU there is
nothing to copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_lens.errors import UnsupportedRouter

DEVICES = ("cpu", "cuda")
"""Types of devices that routing can be recorded on (ROCm calls its devices cuda)."""


class Landing(Protocol):
    """Where copies that were started are waited for."""

    def synchronize(self) -> None:
        """Return when all of them have landed."""
        ...


class Lane(Protocol):
    """How numbers get from one device to the host, and back."""

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Landing]:
        """Start copies to the host: buffers that may be read once the landing is reached.

        The tensors must not be freed or changed before.
        """
        ...

    def bring(self, host: Tensor) -> Tensor:
        """Start a copy to the device; kernels queued from now on see it."""
        ...


class CudaLane:
    """A side stream of one CUDA device.

    Pinned memory is torch's: its caching host allocator hands the same blocks out again, and not
    before the copies into or out of them are done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Landing]:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            # non_blocking to the host means pinned: anything else would be waited for
            host = [t.to("cpu", non_blocking=True) for t in tensors]
            return host, self._side.record_event()

    def bring(self, host: Tensor) -> Tensor:
        return host.pin_memory().to(self._device, non_blocking=True)


lanes: dict[torch.device, Lane] = {}
"""One for each device that was seen, made once."""


def lane_of(device: torch.device) -> Lane | None:
    """The lane of a device; None for the host itself."""
    lane = lanes.get(device)
    if lane is None and device.type == "cuda":
        lane = lanes[device] = CudaLane(device)
    return lane


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A numpy array on a device, without waiting for the device.

    On a CPU the tensor shares the array's memory.
    """
    return onto(torch.from_numpy(array), device)


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for it; itself where it is there already."""
    if tensor.device == device:
        return tensor
    lane = lane_of(device)
    if lane is not None and tensor.device.type == "cpu":
        return lane.bring(tensor)
    # To the host it must be waited for: who asks for it reads it at once.
    return tensor.to(device, non_blocking=device.type != "cpu")


class HostCopy:
    """Tensors of any devices on their way to the host.

    Args:
        tensors: Ours alone: nobody changes them any more.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._host = list(self._tensors)
        self._held: list[Tensor] = []
        self._landings: list[Landing] = []
        by_device: dict[torch.device, list[int]] = {}
        for i, t in enumerate(self._tensors):
            by_device.setdefault(t.device, []).append(i)
        for device, at in by_device.items():
            lane = lane_of(device)
            if lane is None:
                continue
            host, landing = lane.send([self._tensors[i] for i in at])
            self._landings.append(landing)
            for i, t in zip(at, host, strict=True):
                self._host[i] = t

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Forget all but these (some of those given, in the same order)."""
        wanted = {id(t) for t in tensors}
        pairs = list(zip(self._tensors, self._host, strict=True))
        self._held += [t for t, _ in pairs if id(t) not in wanted]  # a copy may still read them
        self._tensors = [t for t, _ in pairs if id(t) in wanted]
        self._host = [host for t, host in pairs if id(t) in wanted]

    def arrays(self) -> list[NDArray[Any]]:
        """Wait until they have landed; numpy arrays in the order given."""
        for landing in self._landings:
            landing.synchronize()
        self._tensors, self._held, self._landings = [], [], []
        return [t.numpy() for t in self._host]


def refuse_devices(models: Iterable[nn.Module]) -> None:
    """Refuse a model on a device that nothing here was written for.

    Raises:
        UnsupportedRouter: Parameters on MPS, XPU or the like.
    """
    for model in models:
        for name, parameter in model.named_parameters():
            if (kind := parameter.device.type) not in (*DEVICES, "meta"):
                raise UnsupportedRouter(
                    f"{name} is on a device of type {kind!r}; routing is recorded on "
                    f'{" and ".join(DEVICES)} only. Move the model, model.to("cpu"), or hand the '
                    "routing over from the host with rec.log."
                )

"""Opens what `torch.save` wrote, without running what it may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moe_lens.errors import ImportRefused


def load_torch_file(path: Path) -> dict[str, Any]:
    """The dictionary in a `.pt` file; its tensors stay on the disk until they are looked at.

    Raises:
        ImportRefused: It is torn, no such file, or holds more than tensors and plain values.
    """
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        raise ImportRefused(
            f"{path} holds more than tensors and plain values; it is not opened, for what it holds "
            "could run."
        ) from e
    except Exception as e:  # a damaged byte makes the unpickler stumble in many ways: IndexError, …
        # torch goes on with advice about its own installation.
        reason = str(e).splitlines()[0].partition(". ")[0] if str(e) else type(e).__name__
        raise ImportRefused(
            f"{path} is torn or was not written by torch.save ({reason}): copy or dump it again."
        ) from e
    if not isinstance(found, dict):
        raise ImportRefused(f"{path} holds a {type(found).__name__}, not a dictionary.")
    return found


def as_array(x: Any, dimensions: int, place: str) -> NDArray[Any]:
    """A tensor of integers as an array, not copied.

    Raises:
        ImportRefused: It is something else.
    """
    import torch

    if not isinstance(x, torch.Tensor):
        raise ImportRefused(f"{place} is a {type(x).__name__}, not a tensor.")
    if x.dtype not in (torch.int32, torch.int64) or x.dim() != dimensions:
        raise ImportRefused(
            f"{place} is {str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)}, not "
            f"integers of {dimensions} dimensions."
        )
    return x.numpy()

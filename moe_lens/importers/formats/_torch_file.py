"""Opens what `torch.save` wrote, without running what it may hold."""

from __future__ import annotations

import pickle
import zipfile
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

    _check_stored(path)
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


def _check_stored(path: Path) -> None:
    """Refuse an archive that was compressed anew, of which torch maps the compressed bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = next((x for x in archive.infolist() if x.compress_type), None)
    except (OSError, ValueError, zipfile.BadZipFile):
        return  # torch says what is wrong with it
    if packed is not None:
        raise ImportRefused(
            f"{path}: {packed.filename} is compressed, which torch.save does not do: bring the "
            "file as it was written."
        )


def shown(x: Any) -> str:
    """What a file has instead, for errors: in one line, and short."""
    text = " ".join(repr(x).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


def as_array(x: Any, dimensions: int, place: str) -> NDArray[Any]:
    """A tensor of integers as an array, not copied.

    Raises:
        ImportRefused: It is something else, or larger than what the file holds of it.
    """
    import torch

    if not isinstance(x, torch.Tensor):
        raise ImportRefused(f"{place} is a {type(x).__name__}, not a tensor.")
    if x.dtype not in (torch.int32, torch.int64) or x.dim() != dimensions:
        raise ImportRefused(
            f"{place} is {str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)}, not "
            f"integers of {dimensions} dimensions."
        )
    # A few bytes may call themselves a tensor of any size: with strides of 0, or on no device.
    there = x.layout == torch.strided and x.device.type == "cpu"
    if not there or x.numel() * x.element_size() > x.untyped_storage().nbytes():
        raise ImportRefused(f"{place}: the file does not hold all of {list(x.shape)}.")
    return x.numpy()

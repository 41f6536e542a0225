"""What must hold of every recorder's arrays before they are believed.

L layers, T tokens, K choices of a token, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused

Ids = NDArray[np.int32]


def as_ids(ids: NDArray[Any], where: str) -> Ids:
    """Expert ids as int32, of whatever integers they were.

    Raises:
        ImportRefused: They are no integers, or too large for any expert.
    """
    if ids.dtype.kind not in "iu":
        raise ImportRefused(f"{where}: expert ids are {ids.dtype}, not integers.")
    if ids.dtype.itemsize >= 4 and ids.dtype != np.int32 and ids.size:
        low, high = int(ids.min()), int(ids.max())
        if low < -(1 << 31) or high >= 1 << 31:
            raise ImportRefused(f"{where}: an expert id is {high if high >= 1 << 31 else low}.")
    return np.ascontiguousarray(ids, np.int32)


def check_ids(ids_LTK: Ids, outputs: int, *, dynamic: bool, layers: list[int], where: str) -> None:
    """Refuse choices that no router makes.

    Args:
        ids_LTK: The choices of layers of one kind; -1: none in this slot.
        outputs: Ids run from 0 to below this.
        dynamic: Slots may hold no choice.
        layers: Numbers of the layers, for errors.
        where: The place in the file, for errors.

    Raises:
        ImportRefused: An id out of range, missing, or twice in one token; or nothing but zeros.
    """
    if not ids_LTK.size:
        return
    low, high = int(ids_LTK.min()), int(ids_LTK.max())
    if high >= outputs:
        place, odd = _first(ids_LTK, ids_LTK >= outputs, layers)
        raise ImportRefused(
            f"{where}, {place}: expert {odd} of {outputs}. Ids run from 0 to {outputs - 1}: if "
            "these are physical ones (replicas), the file must hold their map to logical ones too; "
            "if the model has more experts, say how many with --experts."
            if high < 4 * outputs
            else f"{where}, {place}: expert {odd} of {outputs}: this is no expert id."
        )
    if low < 0 and (low < -1 or not dynamic):
        place, odd = _first(ids_LTK, ids_LTK < (-1 if dynamic else 0), layers)
        what = "no expert (-1)" if odd == -1 else f"expert {odd}"
        raise ImportRefused(f"{where}, {place}: {what}.")
    if ids_LTK.shape[2] < 2:
        return
    sorted_LTK = np.sort(ids_LTK, axis=2)
    twice_LT = (sorted_LTK[:, :, 1:] == sorted_LTK[:, :, :-1]) & (sorted_LTK[:, :, 1:] >= 0)
    if twice_LT.any():
        row, t = (int(x) for x in np.argwhere(twice_LT.any(2))[0])
        layer, ids = layers[row], ids_LTK[row, t].tolist()
        if not ids_LTK[row].any():
            raise ImportRefused(
                f"{where}, layer {layer}: all ids are 0: the recorder never filled it, or the "
                "block has no experts (then name it with --dense-blocks, or give --config)."
            )
        raise ImportRefused(
            f"{where}, layer {layer}, token {t}: {ids} names an expert twice; routers do not."
        )


def check_weights(weights_LTK: NDArray[np.float32], layers: list[int], where: str) -> None:
    """Refuse gate weights that are not numbers.

    Raises:
        ImportRefused: NaN or infinite.
    """
    bad_LTK = ~np.isfinite(weights_LTK)
    if bad_LTK.any():
        place, odd = _first(weights_LTK, bad_LTK, layers)
        raise ImportRefused(f"{where}, {place}: a gate weight is not finite ({odd}).")


class AlwaysFirst:
    """Finds layers of one choice whose every choice is expert 0: an array that nobody filled.

    With more choices a token would name expert 0 twice, which `check_ids` sees at once.
    """

    ENOUGH = 256
    """Tokens above which chance is no explanation."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        self._other: set[int] = set()

    def see(self, layer: int, ids_TK: Ids) -> None:
        if ids_TK.shape[1] == 1 and layer not in self._other:
            if ids_TK.any():
                self._other.add(layer)
            self._tokens[layer] = self._tokens.get(layer, 0) + len(ids_TK)

    def check(self, path: str) -> None:
        """Raises: ImportRefused: There is such a layer."""
        for layer, tokens in self._tokens.items():
            if layer not in self._other and tokens > self.ENOUGH:
                raise ImportRefused(
                    f"{path}: layer {layer}: all {tokens:,} choices are expert 0: the recorder "
                    "never filled it, or the block has no experts (then name it with "
                    "--dense-blocks, or give --config)."
                )


def check_text(text: object, what: str, where: str) -> None:
    """Refuse what cannot be stored as UTF-8: half of a surrogate pair, which JSON may hold.

    Raises:
        ImportRefused: No text, or no whole one.
    """
    if text is None:
        return
    if not isinstance(text, str):
        raise ImportRefused(f"{where}: the {what} is {text!r}, not text.")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ImportRefused(f"{where}: the {what} {text!r} is no whole text.") from e


def _first(
    found_LTK: NDArray[Any], bad_LTK: NDArray[np.bool_], layers: list[int]
) -> tuple[str, Any]:
    """Place and value of the first bad one."""
    row, t, k = (int(x) for x in np.argwhere(bad_LTK)[0])
    return f"layer {layers[row]}, token {t}", found_LTK[row, t, k]

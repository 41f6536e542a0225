"""How many tokens pages look at whose numbers are made of single tokens. No Streamlit here."""

from __future__ import annotations

_TOKENS = 65_536
"""Of all layers together; a layer has `_FEWEST` to `_MOST` of them, so that a page stays quick."""
_FEWEST, _MOST = 2_048, 16_384


def tokens_of_a_layer(layers: int) -> int:
    """How many tokens to look at in each of so many layers; the same on all such pages."""
    return min(max(_TOKENS // max(layers, 1), _FEWEST), _MOST)

"""The zoo: every MoE architecture of the installed transformers, small and random.

`catalog` lists them, `build` makes one and a batch for it, `installed` finds in the installed
source what the list must hold. `ablation` silences one expert in whatever form its weights have,
`proof` compares that with what was captured, `table` writes docs/supported-models.md.
"""

from __future__ import annotations

from support.zoo.build import batch, build
from support.zoo.catalog import ZOO, Architecture

__all__ = ["ZOO", "Architecture", "batch", "build"]

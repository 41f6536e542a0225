"""Silences one expert, in whatever form an architecture keeps its experts' weights.

Legend: T tokens, K choices per token, E experts, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_BANK = re.compile(r"^((.*\.)?(experts|input_linear|output_linear|up_embed|down_embed))$")
"""Where weights of experts stand in an MoE block."""


def blocks(model: nn.Module) -> set[str]:
    """Paths of the modules that hold experts."""
    holders = (path.rpartition(".")[0] for path in _banks(model))
    return {path.removesuffix(".experts") for path in holders}  # jetmoe's attention nests them


def slices(block: nn.Module, expert: int, experts: int) -> list[Tensor]:
    """Views of every weight and bias that is this expert's alone.

    A container of one module per expert gives that module's parameters; any other, the expert's
    share of the parameters whose first axis holds the experts (`[E, …]`, or `[E·F, D]` as in dbrx).

    Raises:
        LookupError: The block has none.
    """
    found: list[Tensor] = []
    for path in _banks(block):
        bank = block.get_submodule(path)
        if each := one_module_each(bank, experts):
            found += list(each[expert].parameters())
        else:
            found += [
                p.view(experts, -1)[expert] for p in bank.parameters() if len(p) % experts == 0
            ]
    if not found:
        raise LookupError(f"{type(block).__name__} has no weights of experts that are known here")
    return found


def _banks(module: nn.Module) -> list[str]:
    paths = [
        path
        for path, bank in module.named_modules()
        if _BANK.match(path) and not isinstance(bank, nn.Linear)  # granite's shared_mlp has two
    ]
    # An outer one may hold more than weights: jetmoe's attention experts, their router.
    return [p for p in paths if not any(other.startswith(f"{p}.") for other in paths)]


def one_module_each(bank: nn.Module, experts: int) -> list[nn.Module] | None:
    """The experts of a container of modules; None where it is anything else."""
    if not isinstance(bank, nn.ModuleList | nn.ModuleDict):
        return None
    each = [child for child in bank.children() if next(child.parameters(), None) is not None]
    return each if len(each) == experts else None


@contextmanager
def silenced(block: nn.Module, expert: int, experts: int) -> Iterator[None]:
    """One expert computes zero; its weights come back bit for bit."""
    parts = slices(block, expert, experts)
    with torch.no_grad():
        saved = [p.clone() for p in parts]
        for p in parts:
            p.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(parts, saved, strict=True):
                p.copy_(before)

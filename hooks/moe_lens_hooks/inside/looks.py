"""What looks like an MoE block: experts of equal form, and something that scores as many.

Only where to look is guessed here. What routes, and whether anything does, is proved when it runs.

Legend: D hidden, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moe_lens_hooks.inside.bank import Bank

_SAYS = re.compile(r"expert|moe|mixture|rout|gat(e|ing)|switch|dispatch", re.IGNORECASE)
_COUNTS = ("num_experts", "n_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")
_LINEARS = 4
"""Products in one feed-forward expert, at most: a block with attention has more."""


@dataclass
class Look:
    """A module that may be an MoE block, and what in it may give the logits."""

    bank: Bank
    gate: nn.Module | None


def look(module: nn.Module) -> Look | None:
    """What makes a module look like an MoE block; None if it does not."""
    for name, child in module.named_children():
        bank = bank_of_list(child)
        if bank is None:
            continue
        gate = _gate_beside(module, child, bank.count)
        named = bool(_SAYS.search(name)) or bool(_SAYS.search(type(module).__name__))
        if gate is None and not _own_scores(module, bank.count):
            if "expert" in name.lower():  # ids may come from outside
                return Look(bank, None)
            continue
        if named or (gate is not None and _feed_forward(bank.members[0], gate)):
            return Look(bank, gate)
    return _look_at_stacks(module)


def bank_of_list(child: object) -> Bank | None:
    """The experts in a list or dictionary of modules of equal form."""
    if not isinstance(child, nn.ModuleList | nn.ModuleDict):
        return None
    members = list(child.values()) if isinstance(child, nn.ModuleDict) else list(child)
    zero = 0
    while zero < len(members) and isinstance(members[len(members) - 1 - zero], nn.Identity):
        zero += 1
    real = members[: len(members) - zero]
    if len(real) < 2 or len({id(m) for m in members}) < len(members):
        return None
    forms = {_form(m) for m in real}
    return Bank(len(members), members, zero=zero) if len(forms) == 1 and () not in forms else None


def gate_for(module: nn.Module, experts: int) -> nn.Module | None:
    """The module, if it can score that many experts: it has a matrix with a row for each."""
    for p in module.parameters():
        if p.ndim == 2 and experts in p.shape:
            return module
    return None


def _form(module: nn.Module) -> tuple[object, ...]:
    """Shapes of parameters by name: quantised ones too."""
    return tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _gate_beside(module: nn.Module, bank: nn.Module, experts: int) -> nn.Module | None:
    """A sibling that is, or holds, what gives E numbers."""
    siblings = [(n, c) for n, c in module.named_children() if c is not bank]
    siblings.sort(key=lambda x: not _SAYS.search(x[0]))  # those that are named so first
    for _, child in siblings:
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            continue
        if _scores(child, experts):
            return child
    return None


def _scores(child: nn.Module, experts: int) -> bool:
    linears = [m for m in child.modules() if isinstance(m, nn.Linear)]
    if linears:
        return len(linears) <= _LINEARS and any(m.out_features == experts for m in linears)
    own = list(child.parameters(recurse=False))
    return any(p.ndim == 2 and experts in p.shape for p in own) and type(child) not in _TORCH


_TORCH = frozenset({nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d})


def _own_scores(module: nn.Module, experts: int) -> bool:
    return any(p.ndim == 2 and experts in p.shape for p in module.parameters(recurse=False))


def _feed_forward(member: nn.Module, gate: nn.Module) -> bool:
    """A small stack of products whose input is as wide as the gate's."""
    linears = [m for m in member.modules() if isinstance(m, nn.Linear)]
    widths = {m.in_features for m in gate.modules() if isinstance(m, nn.Linear)}
    return 0 < len(linears) <= _LINEARS and any(m.in_features in widths for m in linears)


def _look_at_stacks(module: nn.Module) -> Look | None:
    """Experts stacked in parameters, in the block itself or in children."""
    named = bool(_SAYS.search(type(module).__name__))
    own = _stacked(module)
    inner = [n for n, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
    if own and (named or any(_SAYS.search(n) for n in inner)):
        gate = _gate_beside(module, module, own)
        if gate is not None or _own_scores(module, own):
            return Look(Bank(own, stacks=[module]), gate)
    found: dict[int, list[nn.Module]] = {}
    for name, child in module.named_children():
        says = named or _SAYS.search(name) or _SAYS.search(type(child).__name__)
        if says and (count := _stacks_in(child)) is not None:
            found.setdefault(count, []).append(child)
    for count, entries in found.items():
        siblings = [c for c in module.children() if c not in entries]
        gate = next((c for c in siblings if _scores(c, count)), None)
        if gate is not None or _own_scores(module, count):
            stacks = [m for entry in entries for m in _holders(entry, count)]
            return Look(Bank(count, stacks=stacks, entries=entries), gate)
    return None


def _stacked(module: nn.Module) -> int | None:
    """E, if the module itself holds a parameter `[E, ., .]`."""
    if type(module).__module__.startswith("torch."):
        return None
    sizes = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3 and len(p) > 1]
    return sizes[0] if sizes else None


def _stacks_in(child: nn.Module) -> int | None:
    """E, if a child holds experts: by shape, or by its own word where they are flattened."""
    if isinstance(child, nn.ModuleList | nn.ModuleDict):
        return None
    counts = {n for m in child.modules() if (n := _stacked(m)) is not None}
    if len(counts) == 1:
        return counts.pop()
    for name in _COUNTS:  # of the module itself: a config has the number for all of its modules
        said = getattr(child, name, None)
        if isinstance(said, int) and said > 1 and any(_holders(child, said)):
            return said
    return None


def _holders(entry: nn.Module, experts: int) -> Iterator[nn.Module]:
    for m in entry.modules():
        shapes = [p.shape for p in m.parameters(recurse=False) if p.ndim >= 2]
        wide = [len(s) > 2 or s[0] > experts for s in shapes]  # [E, D] is what a router has
        if shapes and all(wide) and all(s[0] % experts == 0 for s in shapes):
            yield m

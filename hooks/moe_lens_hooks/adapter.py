"""What an adapter is: it finds the MoE layers of a model and reads what their experts were given.

An adapter reads; it never computes routing again. For each MoE block it names the block, what is
known of its router, and taps: modules to hook, with a function that picks tensors out of what the
module was given or gave back.

Legend: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moe_lens.trace.meta import LayerInfo


@dataclass(slots=True)
class Observed:
    """What the taps of one MoE block saw in one call.

    `expert_ids_TK` and `weights_TK` are what the experts consumed; all the rest is optional.
    """

    expert_ids_TK: Tensor | None = None
    """int; the choices, in the order the experts got them."""
    weights_TK: Tensor | None = None
    """float; gate weights, same order."""
    logits_TE: Tensor | None = None
    """float; the router's output before any normalisation."""
    router_ids_TK: Tensor | None = None
    """int; the router's own choices, where it states them apart from what the experts got."""
    kept_TK: Tensor | None = None
    """bool; False: this slot found its expert full and nothing computed it. None: dropless."""
    capacity: int | None = None
    """Choices one expert takes in one capacity group."""
    capacity_groups: int = 1
    """Capacity groups in the forward (sequences, where each has a capacity of its own)."""
    chosen_TK: Tensor | None = None
    """bool; False: this slot holds no choice (dynamic k, the router chose fewer than K). None: all
    slots are choices."""
    choices: int | Tensor | None = None
    """With `chosen_TK`: how many choices the router made, counted independently of the ids (a
    0-dim tensor may stay on its device)."""
    token_T: Tensor | None = None
    """int; the tokens that these rows are, as flat indices in the forward's stream. None: all of
    its tokens in order."""
    bias_E: Tensor | None = None
    """float; what is added to the scores for selection only."""
    received_E: Tensor | None = None
    """int; rows that the experts on this rank were given, by whatever rank (expert parallelism)."""
    problems: dict[str, int | Tensor] = field(default_factory=dict)
    """What the adapter found contradictory, and for how many tokens (a 0-dim tensor may stay on
    its device): a breach of the capture."""
    notes: dict[str, int | Tensor] = field(default_factory=dict)
    """Like `problems`, but what a library is known to do: counted as a warning in the trace."""
    present_T: Tensor | None = None
    """bool; set by `laid_out`: the tokens that this layer saw."""
    calls: int = 1
    """How often the experts were called: more than once is more than this holds."""
    held: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    """Tensors as they were when they were seen, with their versions; see `hold`."""

    def hold(self) -> None:
        """Make what was just seen safe to look at when the forward is over.

        Tensors are held by reference, and their versions tell a later change in place. Those of
        inference mode have no version: they are copied.
        """
        for name in (*_TENSORS, "bias_E"):
            tensor = getattr(self, name)
            if tensor is not None and not (name in self.held and self.held[name][0] is tensor):
                setattr(self, name, self._hold(name, tensor))

    def hold_bias(self, bias: Tensor) -> None:
        """The router's own selection bias, before the block runs: a forward may move it."""
        self._hold("bias_E", bias)

    def _hold(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            tensor = tensor.clone()
            self.held[name] = (tensor, -1)
        else:
            self.held[name] = (tensor, tensor._version)
        return tensor

    @property
    def nbytes(self) -> int:
        """Of the larger tensors."""
        tensors = (self.expert_ids_TK, self.weights_TK, self.logits_TE)
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def changed(self) -> bool:
        """A tensor that is held was changed in place; a bias that was only costs the margins."""
        return any(
            v >= 0 and tensor._version != v
            for name, (tensor, v) in self.held.items()
            if name != "bias_E"
        )

    def laid_out(self, tokens: int) -> Observed:
        """The rows of `token_T` among all tokens of the forward, `present_T` saying where.

        Args:
            tokens: T of the forward's stream.
        """
        at = self.token_T
        assert at is not None
        whole = copy.copy(self)
        whole.token_T = None  # `held` is shared: a change after this was seen is still told
        whole.present_T = torch.zeros(tokens, dtype=torch.bool, device=at.device)
        whole.present_T[at] = True
        for name in _TENSORS:
            part = getattr(self, name)
            if part is None or name == "token_T":
                continue
            # NaN where a layer saw no token: such logits are in no sum
            blank = math.nan if name == "logits_TE" else 0
            rows = torch.full((tokens, *part.shape[1:]), blank, dtype=part.dtype, device=at.device)
            rows[at] = part.detach()
            same = name == "router_ids_TK" and part is self.expert_ids_TK
            setattr(whole, name, whole.expert_ids_TK if same else rows)
        return whole


_TENSORS = (
    *("expert_ids_TK", "weights_TK", "logits_TE", "router_ids_TK", "kept_TK"),
    *("chosen_TK", "token_T"),
)

Read = Callable[[Observed, tuple[Any, ...], dict[str, Any], Any], None]
"""Fills an `Observed` from a module's (args, kwargs, output); output is None for an input tap."""

Around = Callable[[Observed], AbstractContextManager[Any]]
"""A context that fills an `Observed` while a module runs."""


@dataclass(frozen=True)
class Tap:
    """A hook on one module: `read` is called with its input (before it runs) or its output.

    A module that is not in the block but around it can be tapped for its input: what `read` sets
    is there when the block is entered.

    `around`, in place of `read`: a context that is entered before the module runs and left after
    it, also when it raises; for what only torch's own functions inside the module see.

    `alone`: `read` sets what it sees and looks at nothing that other taps of the block set. Under
    torch.compile nothing then has to be kept from one tap to the next.
    """

    module: nn.Module
    when: Literal["input", "output", "around"]
    read: Read | None = None
    around: Around | None = None
    alone: bool = False


@dataclass
class MoELayer:
    """One MoE block of the model: `info.layer` is set later, by call order."""

    block: nn.Module
    info: LayerInfo
    taps: list[Tap]
    router: nn.Module | None = None
    """Searched for a selection bias, and for groups where `info` declares none."""
    layout: Literal["bs", "sb"] | None = None
    """How this library flattens its batch, where it never does otherwise."""


class Adapter(Protocol):
    """Recognises MoE blocks.

    Third parties register theirs in the entry-point group `moe_lens.adapters`, or hand them to
    `record(adapters=[...])`.
    """

    name: str

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        """The MoE layer that `module` is, or None.

        Args:
            path: Where it stands in the model.
            module: Any module of the model.

        Raises:
            UnsupportedRouter: It is an MoE block, but one whose routing cannot be seen.
        """
        ...


def first_number(path: str) -> int | None:
    """The decoder block in a module path: the first number in `model.layers.3.mlp`."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def stream_of(path: str) -> str:
    """Encoder and decoder of one model number their tokens apart."""
    parts = path.split(".")
    return next((s for s in ("encoder", "decoder") if s in parts), "main")


def first_int(module: nn.Module | None, *names: str) -> int | None:
    """The first of these attributes that is an int, on the module or on its config."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None

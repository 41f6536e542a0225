"""Tensors inside a block that may be its routing, noted as torch functions make or take them.

Legend: T tokens, E experts, n width of a tensor `[T, n]`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

Site = tuple[str, int, str, int]
"""File and line of the model that called a torch function, the function, which of its tensors."""
Place = tuple[Site, int]
"""A site, and how often it was passed before in this run."""

_LINEAR = frozenset(
    ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__")
)


@dataclass(slots=True)
class Found:
    """A tensor with a row for each token that may be ids, weights or logits."""

    place: Place
    tensor: Tensor
    width: int
    late: bool
    """An expert had been called already."""
    in_gate: bool
    linear: bool
    """It came out of a matrix product."""
    after: bool = False
    """An expert had been used already."""
    version: int | None = None
    """As the experts had it; None: not known, or it is a copy."""

    def keep(self) -> None:
        """From here on a change in place is told; what cannot tell, in inference mode, is copied.

        Unless it was found after the first use of an expert: it may still change on its way there.
        """
        if not self.tensor.is_inference():
            self.version = self.tensor._version
        elif not self.after:
            self.tensor = self.tensor.clone()

    @property
    def changed(self) -> bool:
        """It is another one now than the experts had."""
        return self.version is not None and self.tensor._version != self.version

    @property
    def rows(self) -> Tensor:
        """As `[T, n]`."""
        return self.tensor.detach().reshape(-1, self.width)

    @property
    def floating(self) -> bool:
        return self.tensor.is_floating_point()


@dataclass
class Run:
    """One run of a block: what was found, and how many rows each expert got.

    Attributes:
        lead: The dimensions of its input that count tokens, `[B, S]` or `[T]`.
        experts: E.
        edits: What to make of the tensor found at a place, in a trial.
        stacks: Parameters (ids) whose first use is that of an expert, where no module is called.
        places: Where what matters is, if that is known.
    """

    lead: tuple[int, ...]
    experts: int
    edits: dict[Place, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    stacks: frozenset[int] = frozenset()
    places: frozenset[Place] | None = None
    found: list[Found] = field(default_factory=list)
    rows_E: list[int] = field(default_factory=list)
    in_gate: bool = False
    late: bool = False
    done: bool = False
    """Nothing further is noted."""
    chose_tokens: bool = False
    """A top-k over the tokens was taken, as expert choice does."""
    used: bool = False
    """An expert was used already."""
    _times: Counter[Site] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rows_E = [0] * self.experts

    @property
    def tokens(self) -> int:
        n = 1
        for size in self.lead:
            n *= size
        return n

    @property
    def path(self) -> tuple[Site, ...]:
        """The way the code took up to its first expert: on one path are the same places."""
        return tuple(dict.fromkeys(f.place[0] for f in self.found if not f.late))

    def call(self, expert: int | None, rows: int) -> None:
        """An expert is called; None: a module that holds them all."""
        self.use()
        self.late = True
        if expert is not None:
            self.rows_E[expert] += rows

    def use(self) -> None:
        """An expert is used: what was found so far is what it gets."""
        if self.used:
            return
        self.used = True
        before, self.done = self.done, True  # what is done here is not the block's
        for found in self.found:
            self._keep(found)
        self.done = before

    def _keep(self, found: Found) -> None:
        if self.places is None or found.place in self.places:
            found.keep()

    @contextmanager
    def calling(self, expert: int | None, rows: int) -> Iterator[None]:
        """As `call`, around the call: what goes on in an expert is not routing."""
        self.call(expert, rows)
        before, self.done = self.done, True
        try:
            yield
        finally:
            self.done = before

    def at(self, place: Place) -> Found | None:
        """What was found at a place; None where this run did not pass it."""
        return next((f for f in self.found if f.place == place), None)

    def latest(self) -> list[Found]:
        """What was found, nearest before the first expert first; what came later comes last."""
        early, late = ([f for f in self.found if f.late == x] for x in (False, True))
        return [*early[::-1], *late]

    def width(self, x: Tensor) -> int | None:
        """n, if the tensor has a row of up to E numbers, or one number, for each token."""
        shape, flat = tuple(x.shape), (self.tokens,)
        if shape[:-1] in (self.lead, flat) and 0 < shape[-1] <= self.experts:
            return shape[-1]
        return 1 if shape in (self.lead, flat) else None

    def note(self, x: Tensor, name: str, which: int) -> Tensor:
        """Note a tensor that has the right shape; what to go on with in its place."""
        if x.dtype.is_complex or x.dtype == torch.bool or (width := self.width(x)) is None:
            return x
        site = (*_caller(), name, which)
        place = (site, self._times[site])
        self._times[site] += 1
        if edit := self.edits.get(place):
            x = edit(x)
        linear = name in _LINEAR
        found = Found(place, x, width, self.late, self.in_gate, linear, self.used)
        self.found.append(found)
        if self.used:
            self._keep(found)
        return x

    def set_in(self, x: Any) -> None:
        """Items of a tensor were set, on the way to the experts."""
        for found in self.found:
            if found.tensor is x and found.after:
                self._keep(found)


class Watcher(TorchFunctionMode):
    """Notes what torch functions are given and give back, and may put edited tensors in place."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._known: dict[int, Tensor] = {}
        """Tensors that were noted or need not be, by id; kept, so that ids stay theirs."""
        self._swapped: dict[int, Tensor] = {}
        self._left = False

    def leave(self) -> None:
        """Watch no more: from here on functions run as if nobody had watched.

        Not while a mode that was entered later stands on top: then they are passed through.
        """
        self._run.done = True
        if not self._left and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self._left = True
            self.__exit__(None, None, None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """As `with self`, but for `leave`."""
        self.__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            if not self._left:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        run, kwargs = self._run, kwargs or {}
        if run.done:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        for i, x in enumerate(args):
            if isinstance(x, Tensor) and id(x) not in self._known:
                self._given(x, name, i)
        if self._swapped:
            args = [self._swapped.get(id(x), x) for x in args]
        if name in ("topk", "sort", "argsort"):
            run.chose_tokens |= _over_tokens(run, args, kwargs, name)
        output = func(*args, **kwargs)
        if name == "__setitem__":
            run.set_in(args[0])
        if isinstance(output, Tensor):
            return self._made(output, args, name, 0)
        if isinstance(output, tuple | list) and any(isinstance(x, Tensor) for x in output):
            parts = [
                self._made(x, args, name, i) if isinstance(x, Tensor) else x
                for i, x in enumerate(output)
            ]
            if any(a is not b for a, b in zip(parts, output, strict=True)):
                return type(output)(parts)
        return output

    def _given(self, x: Tensor, name: str, which: int) -> None:
        """A tensor that no function was seen to make: a hook or a compiled part brought it in."""
        self._known[id(x)] = x
        if isinstance(x, nn.Parameter):
            if id(x) in self._run.stacks:
                self._run.use()
            return
        edited = self._run.note(x, f"{name} takes", which)
        if edited is not x:
            self._swapped[id(x)] = edited

    def _made(self, x: Tensor, args: Sequence[Any], name: str, which: int) -> Tensor:
        edited = self._run.note(x, name, which)
        if edited is not x and any(x is a for a in args):  # in place: others hold it too
            edited = x.copy_(edited)
        self._known[id(edited)] = edited
        return edited


def _over_tokens(run: Run, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> bool:
    x = args[0] if args else kwargs.get("input")
    at = 2 if name == "topk" else 1
    dim = kwargs.get("dim", args[at] if len(args) > at else -1)
    if not isinstance(x, Tensor) or not isinstance(dim, int) or x.ndim < 2:
        return False
    others = [n for i, n in enumerate(x.shape) if i != dim % x.ndim]
    return x.shape[dim] in (run.tokens, *run.lead[-1:]) and run.experts in others


def _caller() -> tuple[str, int]:
    """Where the model's own code is, torch's and this module's left out."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.split(".")[0] != "torch":
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno

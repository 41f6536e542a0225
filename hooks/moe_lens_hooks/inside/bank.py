"""The experts of a block that nobody described: one module each, or stacked in parameters.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


@dataclass
class Bank:
    """Either `members` or `stacks` holds the experts.

    Attributes:
        count: E, experts that compute nothing included.
        members: One module an expert, in the order of their ids.
        stacks: Modules whose own parameters hold all experts along the first dimension.
        entries: With stacks: the modules whose call is the first use of an expert.
        zero: How many of the last experts compute nothing (`nn.Identity`).
    """

    count: int
    members: list[nn.Module] = field(default_factory=list)
    stacks: list[nn.Module] = field(default_factory=list)
    entries: list[nn.Module] = field(default_factory=list)
    zero: int = 0

    @property
    def uncalled(self) -> frozenset[int]:
        """Ids of the parameters that hold experts, where no module is called to use them."""
        if self.members or self.entries:
            return frozenset()
        own = (p for stack in self.stacks for p in stack.parameters(recurse=False))
        return frozenset(id(p) for p in own if p.ndim > 2 and p.shape[0] % self.count == 0)

    @contextmanager
    def counted(
        self, call: Callable[[int | None, int], AbstractContextManager[Any]]
    ) -> Iterator[None]:
        """Report each call of a member as (expert, rows), and each of an entry as (None, rows).

        Args:
            call: Gives a context in which it runs.
        """

        def count(expert: int | None, run: Any, args: Any, kwargs: Any) -> Any:
            with call(expert, rows_of(args, kwargs)):
                return run(*args, **kwargs)

        with ExitStack() as stack:
            for e, member in (*enumerate(self.members), *((None, x) for x in self.entries)):
                stack.enter_context(_wrapped(member, partial(count, e)))
            yield

    @contextmanager
    def without(self, experts: Sequence[int], *, by_call: bool) -> Iterator[None]:
        """Some experts give back zeros.

        Args:
            experts: Their ids.
            by_call: The block calls the members, so that their outputs can be had; else their
                parameters are zero for as long as this lasts, and put back bit by bit.
        """
        with self._edited(experts, lambda y: y * 0, lambda p: p.zero_(), by_call=by_call):
            yield

    @contextmanager
    def shifted(self, experts: Sequence[int], by: float, *, by_call: bool) -> Iterator[None]:
        """Some experts give back what they do plus a constant; with stacks, something else."""
        with self._edited(experts, lambda y: y + by, lambda p: p.add_(by), by_call=by_call):
            yield

    @contextmanager
    def _edited(
        self, experts: Sequence[int], output: Edit, parameter: Edit, *, by_call: bool
    ) -> Iterator[None]:
        def edit(run: Any, args: Any, kwargs: Any) -> Any:
            return _each(run(*args, **kwargs), output)

        with ExitStack() as stack:
            for e in experts:
                if by_call:
                    stack.enter_context(_wrapped(self.members[e], edit))
                else:
                    for part in self._parameters(e):
                        stack.enter_context(_changed(part, parameter))
            yield

    def _parameters(self, expert: int) -> Iterator[Tensor]:
        """What belongs to one expert, as tensors that share its memory but not its version."""
        if self.members:
            yield from (p.data for p in self.members[expert].parameters())
        for stack in self.stacks:
            for p in stack.parameters(recurse=False):
                if p.ndim >= 2 and p.shape[0] % self.count == 0:
                    yield p.data.chunk(self.count)[expert]


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens in an expert's input `[…, D]`."""
    x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    return 0 if x is None or x.ndim == 0 else x.numel() // max(x.shape[-1], 1)


@contextmanager
def _wrapped(module: nn.Module, around: Callable[..., Any]) -> Iterator[None]:
    """Put a function around `forward` of one instance, beneath its hooks."""
    own = "forward" in module.__dict__
    run = module.forward
    module.__dict__["forward"] = lambda *args, **kwargs: around(run, args, kwargs)
    try:
        yield
    finally:
        if own:
            module.__dict__["forward"] = run
        else:
            del module.__dict__["forward"]


@contextmanager
def _changed(part: Tensor, change: Edit) -> Iterator[None]:
    saved = part.clone()
    change(part)
    try:
        yield
    finally:
        part.copy_(saved)


def _each(output: Any, edit: Edit) -> Any:
    """Edit every float tensor of a module's output."""
    if isinstance(output, Tensor):
        return edit(output) if output.is_floating_point() else output
    if isinstance(output, tuple | list):
        return type(output)(_each(x, edit) for x in output)
    return output

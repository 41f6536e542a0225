"""Hooks inside compiled code: what they see leaves the graph through an operator of our own.

torch.compile traces a hook once and runs what it traced ever after, so a hook may compute there and
look at Python values, but not hand anything over: that is the operator's work. `moe_lens::tap` says
that it changes a tensor, the same one at every call, which keeps compilers from dropping it, moving
it past another, or running it twice. What it does, while the compiled code runs, is to call the
same functions that hooks outside a graph call, with copies: compiled code uses its buffers again.

An adapter's `read` runs while tracing. Values that a module keeps in attributes are therefore those
of the code around it, also where the attribute itself is only set when the graph has ended.

Which layer a call is of is told by a tensor, not by a number: compilers would bake a number in, and
compile the same block of code once for each layer.

Legend: T tokens, K choices per token, E experts, B sequences, S positions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moe_lens_hooks.adapter import Observed, Read
from moe_lens_hooks.inputs import cache_of, said_length
from moe_lens_hooks.masks import one_mask

_library = torch.library.Library("moe_lens", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "tap(Tensor(a!) order, Tensor point, str what, Tensor[] tensors, SymInt[] numbers) -> ()",
    # cudagraph_unsafe: Inductor runs it between CUDA graphs, not in them: Python must see it run
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)

_order = torch.zeros(1, dtype=torch.int64, device="cpu")
"""What the operator says it changes. Nothing reads it."""

_numbers = itertools.count()
_points: WeakValueDictionary[int, Point] = WeakValueDictionary()

_VALUES = tuple(f.name for f in fields(Observed) if f.name not in ("held", "calls", "present_T"))


def _tap(
    order: Tensor, point: Tensor, what: str, tensors: list[Tensor], numbers: list[int]
) -> None:
    known = _points.get(int(point))
    if known is not None and not known.skips():  # None: the recorder is gone, its code is not
        with torch.inference_mode(False), torch.no_grad():
            known.hear(what, [t.clone() for t in tensors], numbers)


def _tap_nothing(order: Tensor, point: Tensor, what: str, tensors: Any, numbers: Any) -> None:
    pass


_library.impl("tap", _tap, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("moe_lens::tap", _tap_nothing, lib=_library)


class Point:
    """Where hooks of one layer, or of the root, speak from inside compiled code, and are heard."""

    def __init__(self) -> None:
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu")
        _points[number] = self

    def hear(self, what: str, tensors: list[Tensor], numbers: list[int]) -> None:
        """Runs when the compiled code does: `what`, and the values that were carried."""
        raise NotImplementedError

    def skips(self) -> bool:
        """Asked each time before `hear`: nothing that is said here now is to be heard."""
        return False


def _say(
    point: Point, what: str, tensors: Sequence[Tensor] = (), numbers: Sequence[int] = ()
) -> None:
    carried = [t.detach() for t in tensors]
    torch.ops.moe_lens.tap(_order, point.number, what, carried, list(numbers))


class RootPoint(Point):
    """The root module's: its arguments are carried as far as a forward is described by them.

    Args:
        names: Of its positional arguments.
        enter: Called with its arguments by name. Masks come whole; other floats, and what has more
            than two dimensions, as tensors of their shape without values; a cache as its length.
        leave: Called when it has returned.
    """

    def __init__(
        self, names: list[str], enter: Callable[[dict[str, Any]], None], leave: Callable[[], None]
    ) -> None:
        super().__init__()
        self.names, self.enter, self.leave = names, enter, leave

    def trace_enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Traced: the root module is entered."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache = cache_of(given)
        words: list[str] = ["enter"]
        tensors: list[Tensor] = []
        numbers: list[int] = []
        for name, value in given.items():
            if "mask" in name:
                value = one_mask(value)
            if value is cache and cache is not None:
                length = said_length(cache)
                if isinstance(length, Tensor):
                    words.append(f"length {name}")
                    tensors.append(length)
                elif length is not None:
                    words.append(f"number {name}")
                    numbers.append(length)
            elif isinstance(value, Tensor):
                if "mask" in name or (value.ndim <= 2 and not value.is_floating_point()):
                    words.append(f"tensor {name}")
                    tensors.append(value)
                else:
                    words.append(f"shape{value.ndim} {name}")
                    numbers.extend(value.shape)
        _say(self, "\n".join(words), tensors, numbers)

    def trace_leave(self) -> None:
        """Traced: the root module has returned."""
        _say(self, "leave")

    def hear(self, what: str, tensors: list[Tensor], numbers: list[int]) -> None:
        first, *words = _words(what)
        if first == ("leave",):
            self.leave()
            return
        tensor, number = iter(tensors), iter(numbers)
        given: dict[str, Any] = {}
        for kind, name in words:
            if kind == "tensor":
                given[name] = next(tensor)
            elif kind == "length":
                given[name] = CarriedCache(next(tensor))
            elif kind == "number":
                given[name] = CarriedCache(next(number))
            else:
                shape = [next(number) for _ in range(int(kind.removeprefix("shape")))]
                given[name] = torch.empty(shape, device="meta")
        self.enter(given)


class CarriedCache:
    """What compiled code tells of the cache it was given: how many positions it held."""

    __slots__ = ("_length",)  # not even a weak reference: no call of the code has the same one

    def __init__(self, length: int | Tensor) -> None:
        self._length = length

    def get_seq_length(self) -> int | Tensor:
        """Positions, when the forward began."""
        return self._length


class BlockPoint(Point):
    """An MoE block's.

    Args:
        alone: Each of the layer's taps sets what it sees without a look at what others saw.
        skips: The forward that is running is not recorded.
        running: What is seen of the block, where it was entered outside this graph.
        enter: Called with (B, S) of the block's input, None for `[T, D]`.
        look, ahead: Called with a `read` that fills in what a tap saw, in the block or before it.
        wrong: Called with what an adapter stumbled over.
        leave: Called when the block has returned.
    """

    def __init__(
        self,
        *,
        alone: bool,
        skips: Callable[[], bool],
        running: Callable[[], Observed | None],
        enter: Callable[[tuple[int, int] | None], None],
        look: Callable[[Read], None],
        ahead: Callable[[Read], None],
        wrong: Callable[[str], None],
        leave: Callable[[], None],
    ) -> None:
        super().__init__()
        self.alone, self.running = alone, running
        self.skips = skips  # type: ignore[method-assign]
        self.enter, self.look, self.ahead = enter, look, ahead
        self.wrong, self.leave = wrong, leave
        self.seen: Observed | None = None
        """While tracing: what taps of the block saw so far. Hooks outside a graph set it to None,
        since what they see is not in it."""
        self.before: Observed | None = None
        """While tracing: what a tap around the block saw before the block is entered."""

    def trace_enter(self, shape: tuple[int, int] | None) -> None:
        """Traced: the block is entered."""
        if not self.alone:
            self.seen = Observed() if self.before is None else self.before
            self.before = None
        _say(self, "enter", (), () if shape is None else shape)

    def trace_tap(
        self, read: Read, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Traced: a module of the block, a `name`, is about to run or has run."""
        if self.alone:
            seen = Observed()
        else:
            known = self.running() if self.seen is None else self.seen
            if known is None:
                return  # the module runs outside its block
            seen = self.seen = _copy(known)
        self._trace_read("look", seen, read, name, args, kwargs, output)

    def trace_ahead(
        self, read: Read, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Traced: a module around the block is about to run."""
        seen = Observed()
        if not self.alone:
            self.before = seen
        self._trace_read("ahead", seen, read, name, args, kwargs, None)

    def trace_leave(self) -> None:
        """Traced: the block has returned."""
        if not self.alone:
            self.seen = None
        _say(self, "leave")

    def _trace_read(
        self, what: str, seen: Observed, read: Read, name: str, args: Any, kwargs: Any, output: Any
    ) -> None:
        before = _copy(seen)
        try:
            read(seen, args, kwargs, output)
        except Exception as e:
            _say(self, f"wrong\n{name} ({type(e).__name__}, in compiled code)")
            return
        words, tensors, numbers = [what], [], []
        for field in _VALUES:
            old, new = getattr(before, field), getattr(seen, field)
            if field in ("problems", "notes"):
                found = [
                    (f"{field} {text}", n) for text, n in new.items() if old.get(text) is not n
                ]
            else:
                found = [] if new is old else [(field, new)]
            for text, value in found:
                if isinstance(value, Tensor):
                    words.append(f"tensor {text}")
                    tensors.append(value)
                else:
                    words.append(f"{'nothing' if value is None else 'number'} {text}")
                    numbers.extend([] if value is None else [value])
        _say(self, "\n".join(words), tensors, numbers)

    def hear(self, what: str, tensors: list[Tensor], numbers: list[int]) -> None:
        if what.startswith("wrong\n"):
            self.wrong(what.removeprefix("wrong\n"))
            return
        first, *words = _words(what)
        if first == ("enter",):
            self.enter((numbers[0], numbers[1]) if numbers else None)
        elif first == ("leave",):
            self.leave()
        elif first == ("look",):
            self.look(_filling(words, tensors, numbers))
        else:
            self.ahead(_filling(words, tensors, numbers))


def _copy(seen: Observed) -> Observed:
    copy = Observed()
    for name in _VALUES:
        value = getattr(seen, name)
        setattr(copy, name, dict(value) if isinstance(value, dict) else value)
    return copy


@functools.lru_cache(maxsize=4096)
def _words(what: str) -> list[tuple[str, ...]]:
    return [tuple(line.split(" ", 1)) for line in what.split("\n")]


def _filling(words: list[tuple[str, ...]], tensors: list[Tensor], numbers: list[int]) -> Read:
    """A `read` that sets what was carried."""

    def read(seen: Observed, args: Any, kwargs: Any, output: Any) -> None:
        tensor, number = iter(tensors), iter(numbers)
        for kind, text in words:
            value = next(tensor) if kind == "tensor" else next(number) if kind == "number" else None
            field, _, key = text.partition(" ")
            if key:
                getattr(seen, field)[key] = value
            else:
                setattr(seen, field, value)

    return read

"""`force_routing`: a model routes as it is told, until the context ends.

Hooks on the root module and on the MoE blocks; inside a block a mode of torch makes the router's
choice (`choice`), and the adapter's taps see whether the experts got it.

Legend: T tokens, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from moe_lens.errors import SteeringError, UnsupportedRouter
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_int
from moe_lens_hooks.attach import argument_names
from moe_lens_hooks.copies import keep_out_of_copies, let_go
from moe_lens_hooks.forward import recomputing
from moe_lens_hooks.last import make_last
from moe_lens_hooks.steering.agreement import agrees, other_experts
from moe_lens_hooks.steering.choice import OWN, Choice, ForcedChoice, push, remove
from moe_lens_hooks.steering.gift import given, not_plain
from moe_lens_hooks.steering.memory import Memory, first_tensor
from moe_lens_hooks.steering.positions import ByPosition, Name
from moe_lens_hooks.steering.source import Key, Source, Ticket, Wanted

_forced: WeakSet[nn.Module] = WeakSet()
"""Blocks that are being forced: two wills on one block cannot both be done."""


@dataclass
class _Call:
    """One run of one block."""

    layer: MoELayer
    again: bool
    """Recomputed in a backward pass."""
    wanted: Wanted | None
    choice: Choice | None
    seen: Observed
    given: bool = False
    """The experts were given ids and weights."""


@dataclass
class _Forward:
    """A forward of the root module while it runs."""

    ticket: Ticket
    learns: bool
    """Autograd is on: blocks may be recomputed in a backward pass."""
    ran: dict[Key, None] = field(default_factory=dict)
    done: list[tuple[_Call, Tensor, Tensor]] = field(default_factory=list)
    """Calls, the ids that their experts got and, by token, whether those were wanted."""


class Forced:
    """A model whose routing is forced; what `force_routing` returns. Use it in a `with`.

    Attributes:
        forwards: Forwards that were forced.
        forced_tokens: Tokens whose decisions were forced, over all forwards.
        own_tokens: Valid tokens that followed their routers, since there was no decision for them.
    """

    def __init__(
        self, model: nn.Module, layers: list[MoELayer], source: Source, give_weights: bool
    ) -> None:
        taken = [x.info.path for x in layers if x.block in _forced]
        if taken:
            raise SteeringError(
                f"{taken[0]} is forced by another force_routing already. End that one first."
            )
        self.forwards = self.forced_tokens = self.own_tokens = 0
        self._layers, self._source, self._give_weights = layers, source, give_weights
        self._mode = ForcedChoice()
        self._memory = Memory()
        self._calls: list[_Call] = []
        self._forward: _Forward | None = None
        self._seen_ahead: dict[nn.Module, Observed] = {}
        """What taps around a block saw before it is entered."""
        self._contexts: list[tuple[Tap, AbstractContextManager[Any]]] = []
        """Entered by the hooks of a tap and not left."""
        self._handles: list[Any] = []
        self._looks: dict[nn.Module, list[Any]] = {}
        """By block, hooks inside it that look at what those of others may still change."""
        try:
            for layer in layers:
                _forced.add(layer.block)
                self._attach(layer)
            self._attach_root(model)
        except BaseException:
            self.close()
            raise
        keep_out_of_copies(self._handles)

    # -- what users call -------------------------------------------------------------------------

    def rows(self, sequences: list[Name] | None) -> None:
        """Say which recorded sequences the sequences of the next batches are.

        Args:
            sequences: Request ids (text) or numbers of sequences, one for each of the batch; kept
                until changed. None: the next ones in the order in which they were recorded.

        Raises:
            SteeringError: No such sequence, or routing is not forced by position.
        """
        if not isinstance(self._source, ByPosition):
            raise SteeringError('rows are named when routing is forced with by="position".')
        self._source.name_rows(sequences)

    def rewind(self) -> None:
        """The next forward, or batch of sequences, is the first one recorded again."""
        self._source.rewind()

    def close(self) -> None:
        """Let the model route by itself again. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        let_go(self._handles)
        self._handles.clear()
        self._looks.clear()
        self._clean_up()
        for layer in self._layers:
            _forced.discard(layer.block)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- hooks -----------------------------------------------------------------------------------

    def _before(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> Any:
        """Run a hook before this module, of which copies may carry it along."""
        handle = module.register_forward_pre_hook(_own(module, hook), **options)
        self._handles.append(handle)
        return handle

    def _after(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> Any:
        """As `_before`, after it."""
        handle = module.register_forward_hook(_own(module, hook), **options)
        self._handles.append(handle)
        return handle

    def _attach_root(self, model: nn.Module) -> None:
        names = argument_names(model)

        def enter(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter_root(dict(zip(names, args, strict=False)) | kwargs)

        self._before(model, enter, with_kwargs=True, prepend=True)
        self._after(model, lambda m, a, out: self._leave_root())
        self._after(model, lambda m, a, out: self._clean_up(), always_call=True)

    def _attach(self, layer: MoELayer) -> None:
        block = layer.block
        inside = layer.router is not None and any(m is layer.router for m in block.modules())

        def enter(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter_block(layer, args, kwargs, armed=not inside)

        def arm(m: nn.Module, args: Any) -> None:
            call = self._call_of(layer)
            if call is not None and call.choice is not None:
                call.choice.armed = True

        def disarm(m: nn.Module, args: Any, output: Any) -> None:
            # Not before: an adapter's tap may repeat the router's arithmetic.
            call = self._call_of(layer)
            if call is not None and call.choice is not None:
                call.choice.armed = False

        # First of all hooks: what watches the router from inside the block (a recorder's adapter)
        # must stand between the block and this mode, to see what comes out of it.
        self._handles.append(block.register_forward_pre_hook(_refuse_replica))
        self._before(block, enter, with_kwargs=True, prepend=True)
        if inside and layer.router is not None:
            self._before(layer.router, arm)
        for tap in layer.taps:
            self._watch(layer, tap)
        self._after(block, disarm, prepend=True)
        self._after(block, lambda m, a, out: self._check(layer))
        self._after(block, lambda m, a, out: self._leave_block(layer), always_call=True)

    def _watch(self, layer: MoELayer, tap: Tap) -> None:
        """Look at what the experts get, as a recorder would."""
        read, around, module = tap.read, tap.around, tap.module

        def give(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call_of(layer)
            if call is None or call.wanted is None or read is None:
                return None
            if call.wanted.weights_TK is None and call.wanted.give is None:
                return None
            replaced = given(call.wanted, read, call.seen, layer, args, kwargs)
            call.given = call.given or replaced is not None
            return replaced

        def look(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = self._call_of(layer)
            if call is None or call.again or read is None:
                return
            read(call.seen, args, kwargs, output)

        def surround(m: nn.Module, args: Any) -> None:
            call = self._call_of(layer)
            here = nullcontext() if call is None or around is None else around(call.seen)
            here.__enter__()
            self._contexts.append((tap, here))

        def leave(m: nn.Module, args: Any, output: Any) -> None:
            if self._contexts and self._contexts[-1][0] is tap:
                self._contexts.pop()[1].__exit__(None, None, None)

        def look_ahead(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if read is not None and not recomputing():
                seen = self._seen_ahead[layer.block] = Observed()
                read(seen, args, kwargs, None)

        if read is not None and not any(m is module for m in layer.block.modules()):
            self._before(module, look_ahead, with_kwargs=True)
            return
        if around is not None:
            self._before(module, surround)
            self._after(module, leave, always_call=True)
            return
        if tap.when == "input":
            if self._give_weights:  # before anyone looks at what the experts are given
                self._before(module, give, with_kwargs=True, prepend=True)
            handle = self._before(module, lambda m, a, k: look(a, k, None), with_kwargs=True)
        else:
            handle = self._after(module, lambda m, a, k, out: look(a, k, out), with_kwargs=True)
        if module is not layer.block:  # those of the block itself stand in the order of the taps
            self._looks.setdefault(layer.block, []).append(handle)

    def _call_of(self, layer: MoELayer) -> _Call | None:
        """The running call, if it is of this layer."""
        return self._calls[-1] if self._calls and self._calls[-1].layer is layer else None

    def _enter_root(self, inputs: dict[str, Any]) -> None:
        if not recomputing():
            self._clean_up()
            self._forward = _Forward(self._source.begin(inputs), torch.is_grad_enabled())

    def _leave_root(self) -> None:
        forward, self._forward = self._forward, None
        if recomputing() or forward is None:
            return
        for call, got_TK, agreed_T in forward.done:
            if not bool(agreed_T.all()) and call.wanted is not None:
                raise other_experts(call.layer, call.wanted, call.choice, got_TK, agreed_T)
        forced, own = self._source.end(forward.ticket, set(forward.ran))
        self.forwards += 1
        self.forced_tokens += forced
        self.own_tokens += own

    def _enter_block(
        self, layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any], *, armed: bool
    ) -> None:
        for handle in self._looks.get(layer.block, ()):
            make_last(handle)
        x, path = first_tensor(args, kwargs), layer.info.path
        again = recomputing()
        if again:
            times, ticket = self._memory.find(path, layer.block, x)
        elif self._forward is None:
            raise SteeringError(
                f"{path} ran outside a forward of the module that force_routing was given. Give it "
                "the module that you call."
            )
        else:
            times = sum(p == path for p, _ in self._forward.ran)
            self._forward.ran[path, times] = None
            ticket = self._forward.ticket
        shape = () if x is None else tuple(x.shape[:-1])
        seen = self._seen_ahead.pop(layer.block, Observed())
        wanted = self._source.wanted(layer, times, ticket, shape, seen.token_T)
        if not again and self._forward is not None and self._forward.learns:
            self._memory.keep(layer.block, x, times, ticket, wanted)
        choice = None
        # Also where recorded ids are given to the experts: the router agrees then.
        if wanted is not None and (wanted.ids_TK is not None or wanted.edit is not None):
            ids = wanted.ids_TK
            choice = Choice(
                path=path,
                ids_TK=ids,
                top_k=layer.info.top_k if ids is None else ids.shape[1],
                experts=layer.info.experts + layer.info.zero_experts,
                keys=first_int(layer.block, "num_keys"),
                source=self._source.name,
                complete=ids is None or not bool((ids == OWN).any()),
                edit=wanted.edit,
                armed=armed,
            )
        if not self._calls:
            push(self._mode)
        self._calls.append(_Call(layer, again, wanted, choice, seen))
        self._mode.open.append(choice)

    def _check(self, layer: MoELayer) -> None:
        """The block is through: did its experts get what was wanted?"""
        call = self._call_of(layer)
        if call is None or call.again or call.wanted is None or self._forward is None:
            return
        gives = call.wanted.weights_TK is not None or call.wanted.give is not None
        if self._give_weights and gives and not call.given:
            raise not_plain(layer)
        if call.wanted.saw is not None:
            call.wanted.saw(call.seen)
        if call.choice is not None and call.choice.edit is not None:
            call.wanted.ids_TK = call.choice.ids_TK
        if call.wanted.ids_TK is None:  # nothing was changed: the choice was only looked at
            return
        got = call.seen.router_ids_TK if not layer.info.faithful else call.seen.expert_ids_TK
        if got is None:
            raise UnsupportedRouter(
                f"{layer.info.path} ran, but its adapter ({layer.info.adapter}) saw no expert ids: "
                "fused or compiled code may bypass the experts module, which cannot be forced."
            )
        got = got.detach()
        self._forward.done.append((call, got, agrees(call.layer, call.wanted, got)))

    def _leave_block(self, layer: MoELayer) -> None:
        if self._call_of(layer) is not None:
            self._calls.pop()
            self._mode.open.pop()
            if not self._calls:
                remove(self._mode)

    def _clean_up(self) -> None:
        """Whatever an exception left behind: after one like KeyboardInterrupt no hook runs."""
        self._forward = None
        while self._contexts:
            self._contexts.pop()[1].__exit__(None, None, None)
        self._calls.clear()
        self._seen_ahead.clear()
        self._mode.open.clear()
        remove(self._mode)


def _own(module: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of this module alone: a copy that took it along is not forced.

    torch.compile does not trace it: it breaks the graph there and calls it as it is.
    """

    def own(m: nn.Module, *given: Any) -> Any:
        return hook(m, *given) if m is module else None

    return torch.compiler.disable(own)  # type: ignore[no-any-return,no-untyped-call]


def _refuse_replica(module: nn.Module, *given: Any) -> None:
    if getattr(module, "_is_replica", False):
        raise SteeringError(
            "DataParallel runs copies of the model in threads of their own, which cannot be "
            "forced: use DistributedDataParallel."
        )

"""A MoE layer whose routing is seen inside its block's forward.

Legend: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import NoMoELayers, UnsupportedRouter
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_number, stream_of
from moe_lens_hooks.inside.bank import Bank, rows_of
from moe_lens_hooks.inside.confirm import Plan, confirm
from moe_lens_hooks.inside.trial import Call, Rows, trials
from moe_lens_hooks.inside.watch import Found, Run, Watcher

_PLANS = 16
"""Ways that the code of one block may take."""
_K = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k")


def watched_layer(
    path: str, block: nn.Module, bank: Bank, gate: nn.Module | None, adapter: str
) -> MoELayer:
    """The layer that a block is, if its first forward proves what its routing is.

    Args:
        path: Where it stands in the model.
        block: The module whose forward is watched.
        bank: Its experts.
        gate: Gives the logits, where it is a module.
        adapter: Who recognised it.
    """
    info = LayerInfo(
        layer=-1,
        path=path,
        experts=bank.count - bank.zero,
        zero_experts=bank.zero,
        top_k=_own(gate) or _own(block),
        block=first_number(path),
        stream=stream_of(path),
        adapter=adapter,
    )
    watch = _Watch(path, block, bank)
    taps = [Tap(block, "input", watch.enter), Tap(block, "around", around=watch.around)]
    for e, member in enumerate(bank.members):
        taps.append(Tap(member, "input", watch.expert(e)))
    taps += [Tap(entry, "input", watch.expert(None)) for entry in bank.entries]
    if gate is not None:
        taps += [Tap(gate, "input", watch.gate(True)), Tap(gate, "output", watch.gate(False))]
    taps.append(Tap(block, "output", watch.leave))
    return MoELayer(block, info, taps, gate)


def _own(module: nn.Module | None) -> int | None:
    """K by the module's own word. A config's `top_k` may be that of sampling text."""
    found = (getattr(module, name, None) for name in _K)
    return next((k for k in found if isinstance(k, int) and not isinstance(k, bool)), None)


class _Watch:
    """What is known of one block, and its run that is under way."""

    def __init__(self, path: str, block: nn.Module, bank: Bank) -> None:
        self._path, self._block, self._bank = path, block, bank
        self._plans: list[tuple[tuple[object, ...], Plan]] = []
        """With the mode of the block for which each was proved."""
        self._mode: tuple[object, ...] = ()
        self._run: Run | None = None
        self._watcher: Watcher | None = None
        self._call: Call | None = None

    def enter(self, seen: Observed, args: Any, kwargs: Any, _: Any) -> None:
        self._run = self._call = None
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1)
        x = next((x for x in tensors if x.is_floating_point()), None)
        if x is None:
            raise UnsupportedRouter(self._text("it is given no float tensor [..., D]"))
        self._run = Run(tuple(x.shape[:-1]), self._bank.count, stacks=self._bank.uncalled)
        # What it does may depend on these: then it is looked at from its very beginning.
        one = self._run.tokens == 1  # with one token, more shapes are those of ids
        self._mode = (self._block.training, torch.is_grad_enabled(), x.dtype, x.device, one)
        if not any(mode == self._mode for mode, _ in self._plans):
            self._call = Call.of(self._block, self._bank, args, kwargs)
        else:
            known = (p.places for mode, p in self._plans if mode == self._mode)
            self._run.places = frozenset(place for places in known for place in places)

    @contextmanager
    def around(self, seen: Observed) -> Iterator[None]:
        if self._run is None:
            yield
            return
        self._watcher = Watcher(self._run)
        with self._watcher.watching():
            yield

    def expert(self, number: int | None) -> Any:
        def read(seen: Observed, args: Any, kwargs: Any, _: Any) -> None:
            if self._run is not None and self._watcher is not None:
                self._run.call(number, rows_of(args, kwargs))
                # at the first expert all has been seen, if that is what is known of the block
                if self._call is None and not any(p.late for _, p in self._plans):
                    self._watcher.leave()

        return read

    def gate(self, inside: bool) -> Any:
        def read(seen: Observed, args: Any, kwargs: Any, _: Any) -> None:
            if self._run is not None:
                self._run.in_gate = inside

        return read

    def leave(self, seen: Observed, args: Any, kwargs: Any, output: Any) -> None:
        run, call, self._run, self._call = self._run, self._call, None, None
        if run is None:
            return
        known = (p for mode, p in self._plans if mode == self._mode and p.passed(run))
        plan = next(known, None)
        if plan is None:
            plan = self._learn(run, call or Call.of(self._block, self._bank, args, kwargs), output)
        self._fill(seen, run, plan)

    def _learn(self, run: Run, call: Call, output: Any) -> Plan:
        if len(self._plans) >= _PLANS:
            raise UnsupportedRouter(
                self._text(f"its code took more than {_PLANS} different ways to the experts")
            )
        try:
            with trials(self._block, self._bank, call, run.lead) as again:
                plan = confirm(again, run, Rows.of(output, run.lead))
        except NoMoELayers as e:
            raise NoMoELayers(f"{self._name}: {e}; it is not recorded") from e
        except UnsupportedRouter as e:
            raise UnsupportedRouter(self._text(str(e))) from e
        except Exception as e:
            why = f"running it again failed ({type(e).__name__}: {e})"
            raise UnsupportedRouter(self._text(why)) from e
        self._plans.insert(0, (self._mode, plan))
        return plan

    def _fill(self, seen: Observed, run: Run, plan: Plan) -> None:
        ids = run.at(plan.ids)
        assert ids is not None  # it is on the plan's path
        seen.expert_ids_TK = ids.rows
        if plan.weights is None:
            seen.weights_TK = torch.ones_like(ids.rows, dtype=torch.float32)
        else:
            seen.weights_TK = plan.weights.read(run, ids)
            if plan.weights.masked:
                _check_mask(seen, run, plan)
        if any(found is not None and found.changed for found in map(run.at, plan.places)):
            seen.problems["tokens whose routing changed in place after it was used"] = run.tokens
        logits = None if plan.logits is None else run.at(plan.logits)
        seen.logits_TE = None if logits is None else logits.rows
        if plan.rows:
            seen.problems["experts that got another number of tokens than the ids say"] = _unequal(
                ids, run
            )

    @property
    def _name(self) -> str:
        return f"{self._path} ({type(self._block).__name__}) looks like an MoE block"

    def _text(self, why: str) -> str:
        return (
            f"{self._name}, but {why}. Nothing of it is recorded: write an adapter for it "
            "(30 lines, docs/hooks.md), or hand its routing to rec.log(layer, expert_ids, weights)"
        )


def _check_mask(seen: Observed, run: Run, plan: Plan) -> None:
    """Gates that were zero but for the chosen experts must stay so."""
    assert plan.weights is not None
    assert seen.weights_TK is not None
    dense = run.at(plan.weights.place)
    assert dense is not None
    gates, chosen = dense.rows.count_nonzero(), seen.weights_TK.count_nonzero()
    seen.problems["gates of experts that the ids do not name are not zero"] = gates - chosen
    seen.notes["chosen experts with a gate of zero"] = seen.weights_TK.numel() - chosen


def _unequal(ids: Found, run: Run) -> Tensor:
    """How many experts were called with another number of rows than the ids have."""
    E, flat = run.experts, ids.rows.flatten().long()
    flat = torch.where((flat < 0) | (flat >= E), E, flat)  # out of range is told elsewhere
    ones = torch.ones_like(flat)
    said_E = ones.new_zeros(E + 1).index_add_(0, flat, ones)[:E]
    got_E = torch.tensor(run.rows_E, device="cpu")
    if said_E.is_cuda:
        got_E = got_E.pin_memory().to(said_E.device, non_blocking=True)
    return (said_E != got_E).sum()

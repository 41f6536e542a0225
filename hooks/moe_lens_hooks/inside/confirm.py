"""Which of the tensors in a block are its routing: found by putting experts out of action.

A tensor of ids is believed if, for some experts put out of action (one, then several), the tokens
whose output changes are exactly those that it sends to them, and if each expert got as many rows as
it says. A tensor of weights is believed if setting the weight of an expert to zero does to the
output what putting the expert out of action does. Nothing is taken for what it is named.

Legend: T tokens, K choices per token, E experts, D everything the block gives back for a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_lens.errors import NoMoELayers, UnsupportedRouter
from moe_lens_hooks.inside.trial import Rows, Trials
from moe_lens_hooks.inside.watch import Found, Place, Run
from moe_lens_hooks.inside.weigh import Weights, find_weights

_GROUPS = 3
"""Trials with several experts out of action at once: each asks every token."""
_EXPERT_CHOICE = (
    "its experts choose tokens (a top-k over the tokens), and expert choice cannot be recorded yet"
)


@dataclass
class Plan:
    """Where in a block's code its routing stands.

    Attributes:
        ids: A place.
        weights: None: no weights are used, each choice counts whole.
        logits: A place; None: not seen.
        late: Some stand behind the first call of an expert.
        rows: Each expert is called with its own tokens only, so that rows can be compared.
        path: Code that leads there.
    """

    ids: Place
    weights: Weights | None
    logits: Place | None
    late: bool
    rows: bool
    path: tuple[object, ...]

    @property
    def places(self) -> list[Place]:
        """Of ids and weights."""
        return [self.ids, *([] if self.weights is None else [self.weights.place])]

    def passed(self, run: Run) -> bool:
        """The run went the way on which the plan's places are."""
        return self.path == run.path and all(run.at(p) is not None for p in self.places)


@dataclass
class _Suspect:
    """A tensor that may be the ids."""

    found: Found
    ids_TK: Tensor
    """On the host."""
    idle: list[tuple[int, list[int]]] = field(default_factory=list)
    """(token, experts): choices that made no difference, which only a weight of zero explains."""


def confirm(trials: Trials, seen: Run, output: Rows) -> Plan:
    """Find the routing of a block that just ran.

    Args:
        trials: Runs it again.
        seen: What was found in the run.
        output: What it gave back.

    Raises:
        NoMoELayers: Nothing in it chooses experts.
        UnsupportedRouter: It does choose, but no tensor is proved to say what.
    """
    clean, clean_output = _repeat(trials, seen, output)
    ids, called, sparse = _find_ids(trials, clean, clean_output)
    weights = find_weights(trials, clean, clean_output, ids.found, by_call=called)
    _explain(ids, None if weights is None else weights.read(clean, ids.found))
    places = [ids.found.place, *([] if weights is None else [weights.place])]
    for place in places:
        here, there = clean.at(place), seen.at(place)
        assert here is not None
        if there is None or not torch.allclose(there.tensor, here.tensor, equal_nan=True):
            raise UnsupportedRouter("run again with the same input it routes otherwise")
    late = any(f.late for f in map(clean.at, places) if f is not None)
    return Plan(
        ids=ids.found.place,
        weights=weights,
        logits=_logits(seen, ids.ids_TK),
        late=late,
        rows=sparse and seen.rows_E == clean.rows_E,
        path=seen.path,
    )


def _repeat(trials: Trials, seen: Run, output: Rows) -> tuple[Run, Rows]:
    """The same run again, twice; without hooks, if that makes no difference."""
    for hooks in (False, True):
        trials.hooks = hooks
        clean, first = trials.run()
        _, second = trials.run()
        if not first.x_TD.shape[1]:
            raise UnsupportedRouter("what it gives back has no row for each token")
        if first.differ(second).any():
            raise UnsupportedRouter(
                "two runs on the same input, in the same state and with the same random numbers "
                "gave different outputs, so no experiment tells what its experts do"
            )
        same = output.x_TD.shape == first.x_TD.shape and not output.differ(first).any()
        if same or _same_ids(clean, seen):  # a hook on the block itself may change its output
            return clean, first
    raise UnsupportedRouter(
        "run again on the same input it gave another output: it holds state outside of its "
        "modules, or other code changes what goes through it"
    )


def _same_ids(a: Run, b: Run) -> bool:
    x, y = ([f for f in run.found if not f.tensor.is_floating_point()] for run in (a, b))
    return (
        bool(x)
        and [f.place for f in x] == [f.place for f in y]
        and all(torch.equal(f.tensor, g.tensor) for f, g in zip(x, y, strict=True))
    )


def _find_ids(trials: Trials, clean: Run, output: Rows) -> tuple[_Suspect, bool, bool]:
    """The ids; whether the experts are called; whether with their own tokens only."""
    E = trials.bank.count
    called = sum(clean.rows_E) > 0
    sparse = called and any(n != clean.tokens for n in clean.rows_E)
    integers = [f for f in clean.latest() if not f.tensor.is_floating_point()]
    suspects = [_Suspect(f, f.rows.cpu()) for f in integers if _could_be_ids(f.rows, E)]
    if not suspects and not sparse and not clean.chose_tokens:
        raise NoMoELayers("nothing in it chooses experts for a token")
    if sparse:
        suspects = [s for s in suspects if _loads(s.ids_TK, E) == clean.rows_E]
    if not suspects:
        raise UnsupportedRouter(_unlike(clean))
    why = ""
    for experts in _experiments(_loads(suspects[0].ids_TK, E), clean.tokens):
        _, off = trials.run(trials.bank.without(experts, by_call=called))
        off_T, moved_T = output.differ(off), None
        left = []
        for s in suspects:
            sent_T = torch.isin(s.ids_TK, torch.tensor(experts, device="cpu")).any(1)
            if moved_T is None and (sent_T & ~off_T).any():
                moved_T = _moved(trials, output, experts, by_call=called)
            reached_T = off_T if moved_T is None else off_T | moved_T
            s.idle += [(int(t), experts) for t in (sent_T & ~reached_T).nonzero()]
            if (reached_T & ~sent_T).any() or len(s.idle) > clean.tokens:
                why = why or _differs(s, experts, off_T, sent_T)
            else:
                left.append(s)
        suspects = left
    if not suspects:
        raise UnsupportedRouter(_EXPERT_CHOICE if clean.chose_tokens else why)
    suspects.sort(key=lambda s: len(s.idle))  # stable: of equals, the nearest to the experts
    return suspects[0], called, sparse


def _differs(s: _Suspect, experts: list[int], off_T: Tensor, sent_T: Tensor) -> str:
    who = f"expert {experts[0]}" if len(experts) == 1 else f"experts {experts}"
    (file, line, name, _), _ = s.found.place
    t = int((off_T != sent_T).int().argmax())
    return (
        f"with {who} put out of action the outputs of {int(off_T.sum())} tokens changed, where "
        f"what looks like its ids ({name}, {file}:{line}) sends "
        f"{int(sent_T.sum())} tokens there (token {t} is one that differs)"
    )


def _explain(ids: _Suspect, weights_TK: Tensor | None) -> None:
    """Choices that made no difference must have a weight of zero."""
    for t, experts in ids.idle:
        there_K = torch.isin(ids.ids_TK[t], torch.tensor(experts, device="cpu"))
        if weights_TK is None or (weights_TK[t].cpu()[there_K] != 0).any():
            raise UnsupportedRouter(
                f"its ids send token {t} to {ids.ids_TK[t].tolist()}, but with experts {experts} "
                "put out of action the output of that token did not change"
            )


def _unlike(clean: Run) -> str:
    if clean.chose_tokens:
        return _EXPERT_CHOICE
    some = ", ".join(map(str, clean.rows_E[:8])) + (", …" if len(clean.rows_E) > 8 else "")
    return (
        f"its experts got [{some}] rows, and no tensor of ids in it has such counts: does it drop "
        "tokens, pad experts to a capacity, or let experts choose tokens?"
    )


def _could_be_ids(ids_TK: Tensor, experts: int) -> bool:
    if not ids_TK.numel():
        return False
    low, high = ids_TK.aminmax()
    if low < 0 or high >= experts:
        return False
    ordered = ids_TK.sort(-1).values
    return not bool((ordered[:, 1:] == ordered[:, :-1]).any())


def _loads(ids_TK: Tensor, experts: int) -> list[int]:
    loads: list[int] = torch.bincount(ids_TK.flatten().long(), minlength=experts).tolist()
    return loads


def _experiments(loads: list[int], tokens: int) -> Iterator[list[int]]:
    """Which experts to put out of action: the most and the least loaded, one idle, then groups."""
    order = sorted(range(len(loads)), key=lambda e: -loads[e])
    busy, idle = [e for e in order if loads[e]], [e for e in order if not loads[e]]
    for e in dict.fromkeys([*busy[:1], *busy[-1:], *idle[:1]]):
        yield [e]
    chosen_per_token = max(1.0, sum(loads) / max(tokens, 1))
    size = round(0.6 * len(loads) / chosen_per_token)  # about half of the tokens have one of them
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(_GROUPS):
        mixed = torch.randperm(len(loads), generator=generator, device="cpu").tolist()
        yield sorted(mixed[: min(max(1, size), len(loads) - 1)])


def _moved(trials: Trials, output: Rows, experts: list[int], *, by_call: bool) -> Tensor:
    """`[T]`: tokens whose output changes when that of these experts does.

    For experts whose output is zero as it is, or too small to make a difference.
    """
    big = 64 * float(output.x_TD.abs().nan_to_num().amax()) + 1 if by_call else 1.0
    moved_T = torch.zeros(len(output.x_TD), dtype=torch.bool, device="cpu")
    for by in (big, -big):
        moved_T |= output.differ(trials.run(trials.bank.shifted(experts, by, by_call=by_call))[1])
    return moved_T


def _logits(seen: Run, ids_TK: Tensor) -> Place | None:
    """The product in the gate (or, of its width, in the block) that the choice agrees with best.

    A bias or a limit to groups makes the choice another than the best logits, but not a choice at
    random: a product that agrees no better than that is none of the router's.
    """
    E, K = seen.experts, ids_TK.shape[1]
    products = [f for f in seen.found if f.linear and f.width == E and f.floating]
    inside = [f for f in products if f.in_gate]

    def agreement(f: Found) -> float:
        best = f.rows.nan_to_num().topk(K, -1).indices.cpu()
        return float((best.unsqueeze(-1) == ids_TK.unsqueeze(1)).any(1).double().mean())

    found = max(inside or products, key=agreement, default=None)
    floor = K / E + (1 - K / E) / 4
    return found.place if found is not None and agreement(found) >= floor else None

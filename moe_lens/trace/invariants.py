"""What must hold in every forward, whatever the router: checked by the writer on what was seen.

Both sides of each equation were observed separately; nothing here is derived from its other side.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_lens.trace.events import Forward, Ints, LayerCounts


def check(forward: Forward) -> list[str]:
    """Every breach in a forward, in words with the numbers; empty when all is well."""
    found = [f"{text} ({n})" if n > 1 else text for text, n in forward.problems.items()]
    if forward.fires_seen != forward.fires_expected and not found:  # else it is said why
        found.append(
            f"{forward.fires_expected} MoE blocks were entered but the routing of "
            f"{forward.fires_seen} was seen"
        )
    for layer in forward.layers:
        found += (f"layer {layer.layer}: {text}" for text in _layer(layer))
    ends = [forward.parts[0], forward.parts[-1]] if forward.parts else [forward]
    place = " to ".join(f"step {f.step}, forward {f.forward}" for f in ends)
    return [f"{place}: {text}" for text in found]


def _layer(x: LayerCounts) -> Iterator[str]:
    for text, n in x.problems.items():
        yield f"{text} ({n})"
    unweighed = 0
    if x.weight_sum_GE is not None:
        unweighed = int((~np.isfinite(x.weight_sum_GE)).any(0).sum())
    if unweighed:
        yield f"gate weights of {unweighed} experts are NaN or infinite"
    routed, processed = x.routed_GE.sum(0), x.processed_GE.sum(0)
    overflowed = _sum(x.overflowed_GE, routed)
    wrong = routed != processed + overflowed
    if wrong.any() and x.faithful:
        e = int(wrong.argmax())
        yield (
            f"expert {e} was chosen {routed[e]} times, but computed {processed[e]} and "
            f"overflowed {overflowed[e]} ({int(wrong.sum())} experts disagree)"
        )
    lost = int(overflowed.sum())
    dropped, rerouted = _total(x.dropped_GE), _total(x.rerouted_in_GE)
    if lost != dropped + rerouted:
        yield f"{lost} choices overflowed, but {dropped} were dropped and {rerouted} rerouted"
    if int(x.tokens_G.sum()) != x.tokens:
        yield f"{x.tokens} tokens, but the tags have {int(x.tokens_G.sum())}"
    if x.capacity is not None and not x.expert_choice and x.faithful:
        room = x.capacity * x.capacity_groups
        taken = processed + _sum(x.rerouted_in_GE, processed)
        if taken.max(initial=0) > room:
            yield f"an expert computed {taken.max()} choices, over its capacity of {room}"
        # Padding takes room too, and is not in `processed`.
        early = (overflowed > 0) & (taken < room)
        if x.capacity_groups == 1 and not x.padding_tokens and early.any():
            e = int(early.argmax())
            yield f"expert {e} turned choices away with {taken[e]} of {room} slots taken"
    if x.expert_choice:
        if x.capacity is not None:
            full = len(processed) * x.capacity * x.capacity_groups
            done = int(processed.sum()) + _total(x.padding_GE)
            if done != full:
                yield f"expert choice must fill E x C = {full} slots, but filled {done}"
    elif x.choices is not None:
        seen = int(routed.sum()) + _total(x.padding_GE)
        if seen != x.choices:
            yield f"the router made {x.choices} choices, but {seen} were seen"
    elif x.top_k is not None:
        if int(routed.sum()) != x.tokens * x.top_k:
            yield (
                f"{x.tokens} tokens x top-{x.top_k} must make {x.tokens * x.top_k} choices, "
                f"but {int(routed.sum())} were seen"
            )
        padding = _total(x.padding_GE)
        if padding != x.padding_tokens * x.top_k:
            yield (
                f"{x.padding_tokens} padding tokens x top-{x.top_k} must make "
                f"{x.padding_tokens * x.top_k} choices, but {padding} were seen"
            )


def _sum(x_GE: Ints | None, like_E: Ints) -> Ints:
    return np.zeros_like(like_E) if x_GE is None else x_GE.sum(0)


def _total(x_GE: Ints | None) -> int:
    return 0 if x_GE is None else int(x_GE.sum())

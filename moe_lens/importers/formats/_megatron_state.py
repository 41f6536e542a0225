"""What `router_state_rank*.pt` says of routers, which the tracer saves when asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats._torch_file import load_torch_file


@dataclass(frozen=True)
class State:
    """What is known of all routers. None: not known.

    Attributes:
        experts: E.
        hidden_size: Of the model.
        score: softmax, sigmoid or sqrtsoftplus.
        bias: Experts are chosen with a bias that balances their load.
    """

    experts: int | None = None
    hidden_size: int | None = None
    score: str | None = None
    bias: bool = False


def read_state(paths: list[Path]) -> State:
    """Read the first of some files that is there.

    Raises:
        ImportRefused: It is not what the tracer saves, or routers differ.
    """
    for path in paths:
        if path.exists():
            return _read(path)
    return State()


def _read(path: Path) -> State:
    try:
        found = set()
        for x in load_torch_file(path).values():
            experts, hidden = x["weight"].shape
            bias = x["expert_bias"] is not None
            found.add(State(experts, hidden, x["score_function"], bias))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ImportRefused(
            f"{path} is no router_state of Megatron's tracer ({type(e).__name__}: {e})."
        ) from e
    if len(found) != 1:
        raise ImportRefused(f"{path}: {len(found)} kinds of routers; only one can be imported.")
    state = found.pop()
    if state.score not in (None, "softmax", "sigmoid", "sqrtsoftplus"):
        raise ImportRefused(f"{path}: score function {state.score!r} is not known here.")
    return state

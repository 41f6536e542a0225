"""What a view is narrowed to, as parameters of a link. No Streamlit here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Filters:
    """Restrictions named as the parameters of the stored questions; None: no restriction."""

    first_step: int | None = None
    last_step: int | None = None
    """Inclusive."""
    first_layer: int | None = None
    last_layer: int | None = None
    """Inclusive."""
    phase: str | None = None
    tag: str | None = None
    rank: int | None = None

    def given(self) -> dict[str, Any]:
        """Those that restrict."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def in_words(self) -> str:
        """The restrictions in a line; empty: none."""
        parts = [_span("steps", self.first_step, self.last_step)]
        parts.append(_span("layers", self.first_layer, self.last_layer))
        parts += [f"phase {self.phase}"] * (self.phase is not None)
        parts += [f"tag {self.tag}"] * (self.tag is not None)
        parts += [f"rank {self.rank}"] * (self.rank is not None)
        return ", ".join(part for part in parts if part)


NAMES = tuple(f.name for f in fields(Filters))


@dataclass(frozen=True)
class Choices:
    """What a run has to choose from."""

    layers: Sequence[int]
    phases: Sequence[str]
    tags: Sequence[str]
    ranks: Sequence[int]


def parse(given: Mapping[str, str], choices: Choices) -> tuple[Filters, list[str]]:
    """Filters from the parameters of a link, and what of it was left out, in sentences.

    A link may be old, shared between runs, or typed by hand: what does not fit is left out.
    """
    values: dict[str, Any] = {}
    problems = []
    for name in NAMES:
        text = given.get(name)
        if text is None or text == "":
            continue
        value, problem = _value(name, text, choices)
        if problem:
            problems.append(problem)
        else:
            values[name] = value
    for what in ("step", "layer"):
        first, last = values.get(f"first_{what}"), values.get(f"last_{what}")
        if first is not None and last is not None and first > last:
            problems.append(f"No {what} lies between {first} and {last}: both were left out.")
            del values[f"first_{what}"], values[f"last_{what}"]
    return Filters(**values), problems


def _value(name: str, text: str, choices: Choices) -> tuple[Any, str | None]:
    among = {
        "phase": choices.phases,
        "tag": choices.tags,
        "rank": choices.ranks,
        "first_layer": choices.layers,
        "last_layer": choices.layers,
    }.get(name)
    value: Any = text
    if name not in ("phase", "tag"):
        # Beyond 15 digits a browser no longer holds an integer.
        if not (text.isascii() and text.isdigit() and len(text) <= 15):
            return None, f"{name}={text} in the link is no number from 0 up: left out."
        value = int(text)
    if among is not None and value not in among:
        return None, f"{name}={text} in the link is not in this run: left out."
    return value, None


def _span(what: str, first: int | None, last: int | None) -> str:
    if first is None and last is None:
        return ""
    if first == last:
        return f"{what[:-1]} {first:,}"
    if last is None:
        return f"{what} from {first:,}"
    return f"{what} to {last:,}" if first is None else f"{what} {first:,} to {last:,}"

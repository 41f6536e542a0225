"""The stored questions: `queries/*.sql`, whose head comment is documentation and signature.

    -- Tokens routed to each expert, per layer.
    -- $first_step int = null: first step that counts
    select … where ($first_step is null or step >= $first_step)

A default makes every parameter optional; `null` stands for no restriction.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from moe_lens.errors import QueryError

Value = int | float | str | bool | None

_PARAMETER = re.compile(r"\$(\w+) (int|float|text|bool) = (\S+): (.+)")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a stored question; its default makes every one optional."""

    name: str
    type: str
    """int, float, text or bool."""
    default: Value
    doc: str


@dataclass(frozen=True)
class Question:
    """A stored question."""

    name: str
    doc: str
    parameters: tuple[Parameter, ...]
    sql: str

    def bind(self, given: dict[str, object]) -> dict[str, Value]:
        """Values for all parameters: the given ones, checked, and defaults for the rest.

        Raises:
            QueryError: A parameter that the question does not have, or a value of another type.
        """
        known = {p.name for p in self.parameters}
        for name in given:
            if name not in known:
                raise QueryError(
                    f"{self.name} has no parameter {name!r}. It has: {self.signature()}."
                )
        return {
            p.name: self._value(p, given[p.name]) if p.name in given else p.default
            for p in self.parameters
        }

    def signature(self) -> str:
        """The parameters in words."""
        return (
            ", ".join(f"{p.name} ({p.type}, {_shown(p.default)})" for p in self.parameters)
            or "no parameters"
        )

    def _value(self, parameter: Parameter, value: object) -> Value:
        try:
            return _convert(parameter.type, value)
        except (TypeError, ValueError):
            raise QueryError(
                f"{self.name}: {parameter.name} must be {parameter.type}, got {value!r}. "
                f"It is: {parameter.doc}."
            ) from None


@cache
def questions() -> dict[str, Question]:
    """All stored questions by name."""
    found = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".sql"):
            name = file.name.removesuffix(".sql")
            found[name] = parse(name, file.read_text(encoding="utf-8"))
    return found


def question(name: str) -> Question:
    """The stored question of this name.

    Raises:
        QueryError: There is none; the message lists what there is.
    """
    known = questions()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise QueryError(
            f"There is no stored question {name!r}.{hint}\nStored questions: {', '.join(known)}."
        )
    return known[name]


def parse(name: str, text: str) -> Question:
    """Read a question's head comment.

    Raises:
        QueryError: The head has no documentation, or a parameter line that is not understood.
    """
    doc, parameters = [], []
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        line = line.removeprefix("--").strip()
        if line.startswith("$"):
            match = _PARAMETER.fullmatch(line)
            if match is None:
                raise QueryError(f"{name}.sql: cannot read the parameter line {line!r}.")
            parameters.append(Parameter(match[1], match[2], _convert(match[2], match[3]), match[4]))
        elif parameters:
            raise QueryError(f"{name}.sql: {line!r} follows the parameters; put it before them.")
        else:
            doc.append(line)
    if not doc:
        raise QueryError(f"{name}.sql has no head comment that says which question it answers.")
    return Question(name, "\n".join(doc).strip(), tuple(parameters), text)


def _convert(type_: str, value: object) -> Value:
    """A parameter's value from Python or from the command line's text."""
    if value is None or value == "null":
        return None
    if type_ == "text" and isinstance(value, str):
        return value
    if type_ == "bool" and (isinstance(value, bool) or value in ("true", "false")):
        return value in (True, "true")
    if isinstance(value, bool):
        raise TypeError
    if type_ == "int":
        number = int(value) if isinstance(value, str) else value
        if not hasattr(number, "__index__"):
            raise TypeError
        return int(number)  # numpy's integers too
    if type_ == "float":
        return float(value)  # type: ignore[arg-type]
    raise TypeError


def _shown(value: Value) -> str:
    if value is None:
        return "optional"
    return f"default {str(value).lower() if isinstance(value, bool) else value}"

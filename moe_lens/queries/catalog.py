"""The stored questions: `queries/*.sql`, whose head comment is documentation and signature.

    -- Tokens routed to each expert, per layer.
    -- $first_step int = null: first step that counts
    -- $every int = 1 (1 or more): steps per bucket
    -- $by text = lift (lift or share): what to rank by
    select … where ($first_step is null or step >= $first_step)

A default makes every parameter optional; `null` stands for no restriction. Parentheses say which
values there are: the least number, or the words of a fixed set; `null` is then refused.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from moe_lens.errors import QueryError
from moe_lens.queries.literals import Value, literal

_PARAMETER = re.compile(r"\$(\w+) (int|float|text|bool) = (\S+)(?: \(([^()]+)\))?: (.+)")
_NAMED = re.compile(r"--[^\n]*|'[^']*'|\$(\w+)")
"""A parameter in SQL, or a comment or text, in which `$name` is no parameter."""
_LEAST = re.compile(r"(\S+) or more")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a stored question; its default makes every one optional."""

    name: str
    type: str
    """int, float, text or bool."""
    default: Value
    doc: str
    choices: tuple[str, ...] = ()
    """The words that a text may be; empty: any."""
    least: float | None = None
    """The smallest value of a number; None: any."""

    def allowed(self) -> str:
        """What its values may be, in words; empty: anything of its type."""
        if self.least is not None:
            return f"{self.least:g} or more"
        return " or ".join(self.choices)

    def permits(self, value: Value) -> bool:
        """Whether a value of the right type is one of those there are."""
        if self.least is not None:
            return isinstance(value, int | float) and value >= self.least
        return not self.choices or value in self.choices


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
            QueryError: A parameter that the question does not have, a value of another type, or one
                that is not among those there are.
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

    def with_values(self, given: dict[str, object]) -> str:
        """The SQL with every parameter's value in its place, to be read, copied and run elsewhere.

        The head keeps its documentation and loses the parameters.

        Raises:
            QueryError: As `bind`.
        """
        values = self.bind(given)
        lines = self.sql.splitlines()
        text = "\n".join(line for line in lines if not line.startswith("-- $"))
        return _NAMED.sub(lambda m: literal(values[m[1]]) if m[1] else m[0], text)

    def signature(self) -> str:
        """The parameters in words."""
        return (
            ", ".join(f"{p.name} ({p.type}, {_shown(p)})" for p in self.parameters)
            or "no parameters"
        )

    def _value(self, parameter: Parameter, value: object) -> Value:
        expected = parameter.type
        try:
            converted = _convert(parameter.type, value)
        except (TypeError, ValueError):
            pass
        else:
            if parameter.permits(converted):
                return converted
            expected = parameter.allowed()
        raise QueryError(
            f"{self.name}: {parameter.name} must be {expected}, got {value!r}. "
            f"It is: {parameter.doc}."
        )


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
            parameters.append(_parameter(name, match))
        elif parameters:
            raise QueryError(f"{name}.sql: {line!r} follows the parameters; put it before them.")
        else:
            doc.append(line)
    if not doc:
        raise QueryError(f"{name}.sql has no head comment that says which question it answers.")
    return Question(name, "\n".join(doc).strip(), tuple(parameters), text)


def _parameter(question: str, match: re.Match[str]) -> Parameter:
    name, type_, default, allowed, doc = match.groups()
    value = _convert(type_, default)
    if allowed is None:
        return Parameter(name, type_, value, doc)
    least = _LEAST.fullmatch(allowed)
    if type_ in ("int", "float") and least is not None:
        made = Parameter(name, type_, value, doc, least=float(least[1]))
    elif type_ == "text" and least is None:
        made = Parameter(name, type_, value, doc, choices=tuple(allowed.split(" or ")))
    else:
        raise QueryError(
            f"{question}.sql: ${name} is {type_}, and ({allowed}) does not fit: a number takes "
            "(N or more), a text (a or b)."
        )
    if not made.permits(value):
        raise QueryError(f"{question}.sql: the default of ${name}, {default}, is not ({allowed}).")
    return made


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


def _shown(parameter: Parameter) -> str:
    value, allowed = parameter.default, parameter.allowed()
    if value is None:
        return "optional"
    shown = f"default {str(value).lower() if isinstance(value, bool) else value}"
    return f"{allowed}, {shown}" if allowed else shown

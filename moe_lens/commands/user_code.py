"""What a user names as `module:name` or `file.py:name`, loaded from the folder one stands in."""

from __future__ import annotations

import inspect
import os
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_lens.errors import CommandError, MoeLensError

_LONGEST = 400
"""Characters of an error's text that are repeated: some list every weight of a model."""


def load(text: str, option: str) -> Any:
    """The object of this name.

    Raises:
        CommandError: There is none, or its module fails.
    """
    place, _, name = text.partition(":")
    if not place or not name:
        raise CommandError(f"{option} takes module:name or file.py:name, got {text!r}.")
    folder, module_name = os.getcwd(), place
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise CommandError(f"{option}: there is no file {place}.")
        folder, module_name = str(path.resolve().parent), path.stem
    if folder not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, folder)
    with said_by(f"{option} {text}"):
        module = import_module(module_name)
    if not hasattr(module, name):
        where = getattr(module, "__file__", None) or place
        raise CommandError(f"{option}: {where} has no {name!r}.")
    return getattr(module, name)


@contextmanager
def said_by(what: str) -> Iterator[None]:
    """Inside, code of the user's runs: what it raises becomes one line that names its place.

    It sees no words of our command line, so that a module that parses its own finds none.

    Args:
        what: What runs: `--model lab:model`; `sys.argv` begins with its last word.

    Raises:
        CommandError: It raised, or ended the process; the message says what, and in which line.
    """
    words = sys.argv
    sys.argv = [what.split()[-1].partition(":")[0]]
    try:
        yield
    except MoeLensError:
        raise
    except SystemExit as e:
        code = "" if e.code is None else repr(e.code)
        raise CommandError(
            f"{what}: it ended the process (sys.exit({code}){_at(e)}). What is named here is "
            'imported: a script\'s own work belongs under `if __name__ == "__main__":`.'
        ) from e
    except Exception as e:
        place = _place(e)
        if place is None:  # an error of ours: its traceback is what helps
            raise
        said = textwrap.shorten(f"{type(e).__name__}: {e}".removesuffix(": "), _LONGEST)
        raise CommandError(f"{what}: {said} ({place})") from e
    finally:
        sys.argv = words


def _at(error: BaseException) -> str:
    place = _place(error)
    return f" in {place}" if place else ""


def _place(error: BaseException) -> str | None:
    """File and line: the user's innermost, else the last; None where only our code ran."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")
    ]
    frames = frames or list(traceback.extract_tb(error.__traceback__))
    libraries = tuple({sysconfig.get_path(x) + os.sep for x in ("stdlib", "purelib", "platlib")})
    ours = _our_folders()
    theirs = [f for f in frames if not f.filename.startswith((*libraries, *ours, "<"))]
    last = theirs[-1] if theirs else frames[-1]
    return None if last.filename.startswith(ours) else f"{last.filename}, line {last.lineno}"


def _our_folders() -> tuple[str, ...]:
    found = [find_spec(name) for name in ("moe_lens", "moe_lens_hooks")]
    return tuple(
        f"{place}{os.sep}"
        for spec in found
        if spec is not None
        for place in spec.submodule_search_locations or ()
    )


def load_model(text: str) -> Any:
    """The model that `--model` names, or that the function of this name returns.

    Raises:
        CommandError: It is none.
    """
    from torch import nn

    made = load(text, "--model")
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise CommandError(f"--model {text} is a {type(made).__name__}, not a function.")
        _check_takes(made, "--model", text)
        with said_by(f"--model {text}"):
            made = made()
    if not isinstance(made, nn.Module):
        raise CommandError(
            f"--model {text} returned a {type(made).__name__}; it must return a torch.nn.Module."
        )
    return made


def load_batches(text: str) -> Any:
    """The batches that `--data` names, or that the function of this name returns.

    Raises:
        CommandError: There are none; or, when the next one is asked for, making it fails.
    """
    from torch import Tensor

    made = load(text, "--data")
    if callable(made):
        _check_takes(made, "--data", text)
        with said_by(f"--data {text}"):
            made = made()
    if isinstance(made, Tensor | Mapping):  # one batch
        return [made]
    if not hasattr(made, "__iter__"):
        raise CommandError(f"--data {text} gave a {type(made).__name__}; it must give batches.")
    return _one_by_one(made, f"--data {text}")


def load_loss(text: str) -> Callable[[Any, Any], Any]:
    """The function that `--loss` names.

    Raises:
        CommandError: It is none.
    """
    found = load(text, "--loss")
    if not callable(found):
        raise CommandError(f"--loss {text} is a {type(found).__name__}, not a function.")
    _check_takes(found, "--loss", text, "model", "batch")
    return found  # type: ignore[no-any-return]


def _check_takes(function: Callable[..., Any], option: str, text: str, *names: str) -> None:
    """Raise if it cannot be called with these.

    Raises:
        CommandError: It takes others.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin: the call will tell
        return
    try:
        signature.bind(*names)
    except TypeError as e:
        called = f"{text.partition(':')[2]}({', '.join(names)})"
        raise CommandError(f"{option} {text} is called as {called}: {e}.") from e


def _one_by_one(batches: Iterable[Any], what: str) -> Iterator[Any]:
    end = object()
    with said_by(what):
        left = iter(batches)
    while True:
        with said_by(what):
            batch = next(left, end)
        if batch is end:
            return
        yield batch

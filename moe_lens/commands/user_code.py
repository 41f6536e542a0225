"""What a user names as `module:name` or `file.py:name`, loaded from the folder one stands in."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from moe_lens.errors import CommandError, MoeLensError


def load(text: str, option: str) -> Any:
    """The object of this name.

    Raises:
        CommandError: There is none, or its module fails.
    """
    place, _, name = text.partition(":")
    if not place or not name:
        raise CommandError(f"{option} takes module:name or file.py:name, got {text!r}.")
    folder = os.getcwd()
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise CommandError(f"{option}: there is no file {place}.")
        folder, place = str(path.resolve().parent), path.stem
    if folder not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, folder)
    module = called(lambda: import_module(place), f"{option} {text}")
    if not hasattr(module, name):
        where = getattr(module, "__file__", None) or place
        raise CommandError(f"{option}: {where} has no {name!r}.")
    return getattr(module, name)


def called(function: Callable[[], Any], what: str) -> Any:
    """What a function of the user's returns.

    Raises:
        CommandError: It raised; the message says what, and in which line.
    """
    try:
        return function()
    except MoeLensError:
        raise
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        said = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
        raise CommandError(f"{what}: {said} ({last.filename}, line {last.lineno})") from e


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
        made = called(made, f"--model {text}")
    if not isinstance(made, nn.Module):
        raise CommandError(
            f"--model {text} returned a {type(made).__name__}; it must return a torch.nn.Module."
        )
    return made


def load_batches(text: str) -> Any:
    """The batches that `--data` names, or that the function of this name returns.

    Raises:
        CommandError: There are none.
    """
    from torch import Tensor

    made = load(text, "--data")
    if callable(made):
        made = called(made, f"--data {text}")
    if isinstance(made, Tensor | dict):  # one batch
        return [made]
    if not hasattr(made, "__iter__"):
        raise CommandError(f"--data {text} gave a {type(made).__name__}; it must give batches.")
    return made

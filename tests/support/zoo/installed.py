"""What the installed transformers has, read from its source: no list of ours says what exists.

A class belongs to a Mixture of Experts, or speaks like one, if its own code has a name with
"expert" or "router" in it. Nothing routed has ever come without one; what only speaks like one is
told apart by hand (`catalog.NO_ROUTED_EXPERTS`), so that something new is noticed either way.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import torch
import transformers
from support.zoo.build import build
from support.zoo.catalog import Architecture
from torch import nn

_NAMED = re.compile("expert|router", re.IGNORECASE)


MODELS = Path(transformers.__file__).parent / "models"


def speaking_of_experts(root: Path = MODELS) -> dict[str, list[str]]:
    """Package of `transformers.models` to its classes that have such a name in their code."""
    found: dict[str, list[str]] = {}
    for path in sorted(root.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if not _NAMED.search(source):
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and any(map(_NAMED.search, _names(node))):
                found.setdefault(path.parent.name, []).append(node.name)
    return found


def _names(node: ast.ClassDef) -> set[str]:
    inner = list(ast.walk(node))
    return (
        {x.attr for x in inner if isinstance(x, ast.Attribute)}
        | {x.id for x in inner if isinstance(x, ast.Name)}
        | {x.arg for x in inner if isinstance(x, ast.arg)}
    )


def parts(package: str, classes: list[str]) -> set[str]:
    """Those of a package's classes that are parts of models, not whole ones and not outputs."""
    home = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    whole = transformers.PreTrainedModel
    return {
        name
        for name in classes
        if inspect.isclass(cls := getattr(home, name))
        and issubclass(cls, nn.Module)
        and not issubclass(cls, whole)
    }


def built(entry: Architecture) -> set[str]:
    """Names of the classes that a model of the zoo is made of."""
    with torch.device("meta"):  # shapes only
        return {type(module).__name__ for module in build(entry).modules()}

"""Which text of the four domains does this installation have?

Every domain is a list of documents, ``(name, bytes)``, in an order that does not depend on the
machine. Nothing is downloaded: the text comes with Python, plotly and torch.

- ``python``: modules of the standard library. Tests, code-page tables and the help topics below
  are left out.
- ``prose``: the help topics of ``pydoc_data.topics``, the English of the language reference.
- ``javascript``: ``plotly.min.js``. plotly ships one library in one minified file (its second
  large file, ``widgetbundle.js``, holds the same library again, so it would leak one into the
  other). A document here is therefore a *region* of that one file: 16 KiB, with 1 KiB left out
  between neighbours, so that a split cuts through no statement of ordinary length.
- ``cpp``: headers in ``torch/include``, without the generated one-operator stubs of ``ATen/ops``,
  which repeat each other almost word for word.
"""

from __future__ import annotations

import importlib
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Document = tuple[str, bytes]

_REGION_BYTES = 16 * 1024
_GAP_BYTES = 1 * 1024
_NOT_PROGRAM_TEXT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


def python_documents() -> Iterator[Document]:
    """Modules of the standard library, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if _NOT_PROGRAM_TEXT.isdisjoint(inner.parts):
            yield inner.as_posix(), path.read_bytes()


def prose_documents() -> Iterator[Document]:
    """Help topics of the language reference, by name."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise missing("prose", "the module pydoc_data.topics of the standard library") from None
    for name in sorted(topics):
        yield f"pydoc_data.topics/{name}", topics[name].encode()


def javascript_documents() -> Iterator[Document]:
    """Regions of ``plotly.min.js``, by offset."""
    path = _package_folder("javascript", "plotly") / "package_data" / "plotly.min.js"
    if not path.is_file():
        raise missing("javascript", f"the file {path}")
    text = path.read_bytes()
    for start in range(0, len(text), _REGION_BYTES):
        yield f"{path.name}@{start:08d}", text[start : start + _REGION_BYTES - _GAP_BYTES]


def cpp_documents() -> Iterator[Document]:
    """Headers of ``torch/include``, by path."""
    root = _package_folder("cpp", "torch") / "include"
    for path in sorted(root.rglob("*.h")):
        inner = path.relative_to(root).as_posix()
        if not inner.startswith("ATen/ops/"):
            yield inner, path.read_bytes()


SOURCES: dict[str, Callable[[], Iterator[Document]]] = {
    "python": python_documents,
    "prose": prose_documents,
    "javascript": javascript_documents,
    "cpp": cpp_documents,
}


def missing(tag: str, what: str) -> CommandError:
    """The error for a domain whose text is not on this machine."""
    return CommandError(
        f"the demo has no text for the domain {tag!r}: {what} is not there or too short; "
        "use a complete Python installation with torch and plotly installed by pip"
    )


def _package_folder(tag: str, package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise missing(tag, f"the package {package}")
    return Path(spec.origin).parent

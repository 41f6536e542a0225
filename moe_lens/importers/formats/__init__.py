"""The formats that can be imported, and which of them a file is.

A format is a module in this folder with three names:

    SAYS: str                                       one line for `moe-lens import --help`
    recognises(path: Path, head: bytes) -> bool     whether a file, or a folder of them, is this
    open_source(path: Path, given: Given) -> Source refuses with ImportRefused, naming the place

`head` is the first 4,096 bytes of a file; b"" of a folder. `recognises` never raises.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from moe_lens.errors import ImportRefused
from moe_lens.importers.source import Given, Source

FORMATS = {
    "sglang": "sglang",
    "sglang-responses": "sglang_responses",
    "vllm": "vllm",
    "megatron": "megatron",
    "tensorrt-llm": "tensorrt_llm",
    "moe-policylang": "moe_policylang",
    "llama.cpp": "llama_cpp",
}
"""Modules by the name of their format, in the order in which files are shown to them."""

_HEAD = 4096


class Format(Protocol):
    """What a format's module has."""

    SAYS: str

    def recognises(self, path: Path, head: bytes) -> bool: ...
    def open_source(self, path: Path, given: Given) -> Source: ...


def format_named(name: str) -> Format:
    """The module of a format.

    Raises:
        ImportRefused: There is none of that name.
    """
    if name not in FORMATS:
        raise ImportRefused(f"no format is called {name!r}: it is one of {', '.join(FORMATS)}.")
    return cast("Format", import_module(f"{__name__}.{FORMATS[name]}"))


def format_of(path: Path) -> str:
    """The name of the format that a file or folder is in.

    Raises:
        ImportRefused: It is not there, cannot be read, or no format knows it.
    """
    try:
        head = b""
        if not path.is_dir():
            with path.open("rb") as f:
                head = f.read(_HEAD)
    except OSError as e:
        raise ImportRefused(f"{path} cannot be read: {e.strerror or e}.") from e
    for name in FORMATS:
        if format_named(name).recognises(path, head):
            return name
    raise ImportRefused(
        f"{path} is in no format that is known here. If it is one of {', '.join(FORMATS)}, say "
        "which with --format, and the error will say what is wrong with it."
    )

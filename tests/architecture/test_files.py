"""Rules for files: their length, what they must not mention, and how a query begins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

MAX_LINES = 500

# Spelled in pieces, so that this file passes its own check.
OF_A_MACHINE = re.compile(
    "|".join(
        (
            r"(?<![\w.~-])/" r"root/",
            r"(?<![\w.~-])/" r"(?:home|Users)/\w",
            r"\b(?:extra[-_])?" r"index[-_]url\b",
            r"\bfind[-_]" r"links\b",
            r"https?://\S+/" r"simple\b",
            r"\bpypi" r"\.org\b",
            r'"resolved": *"' r"http",
        )
    ),
    re.IGNORECASE,
)


def mentions_of_a_machine(text: str, folders: tuple[str, ...] = ()) -> list[str]:
    """What in `text` is true of one machine only: its paths (or `folders`), its package index."""
    found = [match.group() for match in OF_A_MACHINE.finditer(text)]
    return found + [folder for folder in folders if folder in text]


@pytest.mark.parametrize(
    "text",
    [
        "cd /" + "root/moe_lens",
        "open('/" + "home/ada/run1')",
        "pip install --index" + "-url https://example.com",
        "https://mirror.example.com/pypi/" + "simple",
    ],
)
def test_the_check_would_notice(text: str) -> None:
    assert mentions_of_a_machine(text)


def test_no_file_mentions_one_machine(root: Path, project_files: list[str]) -> None:
    # The checkout's own place and the user's home, where they are more than a bare "/" or "/src".
    folders = tuple(str(path) for path in (root, Path.home()) if len(path.parts) > 2)
    found = {}
    for name in project_files:
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        if mentions := mentions_of_a_machine(text, folders):
            found[name] = mentions
    assert found == {}


def test_source_files_are_short(root: Path, project_files: list[str]) -> None:
    sources = [name for name in project_files if name.endswith((".py", ".cu", ".cuh"))]
    assert len(sources) > 10
    lines = {name: len((root / name).read_text("utf-8").splitlines()) for name in sources}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_every_query_begins_with_its_documentation(root: Path, project_files: list[str]) -> None:
    queries = [name for name in project_files if name.endswith(".sql")]
    assert queries
    silent = [name for name in queries if not (root / name).read_text("utf-8").startswith("-- ")]
    assert silent == []

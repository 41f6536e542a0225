"""The page as an SVG picture, as a dark terminal shows it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.terminal_theme import MONOKAI

from moe_lens.errors import CommandError
from moe_lens.terminal.page import render

if TYPE_CHECKING:
    from moe_lens.queries.session import Trace

_WEB_FONT = re.compile(r"@font-face \{.*?\}", re.DOTALL)


def save_picture(trace: Trace, path: Path, width: int, phase: str | None = None) -> None:
    """Draw the page of a trace and save it.

    Args:
        trace: An open trace.
        path: The file, replaced if it is there.
        width: Columns.
        phase: As in `render`.

    Raises:
        CommandError: The file cannot be written.
    """
    console = Console(
        width=width,
        highlight=False,
        record=True,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    render(trace, console, phase)
    drawn = console.export_svg(title="moe-lens report", theme=MONOKAI)
    try:
        # A picture that asks another machine for its font is no picture of ours.
        path.write_text(_WEB_FONT.sub("", drawn), encoding="utf-8")
    except OSError as e:
        raise CommandError(f"cannot write {path}: {e}", exit_code=1) from e

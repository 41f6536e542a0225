"""`import moe_lens` is light: the front door names things and loads them when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("duckdb", "numpy", "pandas", "plotly", "pyarrow", "streamlit", "torch", "transformers")


def heavy_modules_after(statements: str) -> set[str]:
    """The heavy modules that a fresh interpreter holds once it ran `statements`."""
    code = f"{statements}\nimport sys\nprint(*sys.modules.keys() & set({HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_the_front_door_loads_nothing_heavy() -> None:
    assert heavy_modules_after("import moe_lens") == set()


def test_the_check_would_notice() -> None:
    assert "duckdb" in heavy_modules_after("import moe_lens\nimport duckdb")
    assert "torch" in heavy_modules_after("import moe_lens\nmoe_lens.record")


def test_every_public_name_resolves() -> None:
    import moe_lens

    assert {"open", "record"} <= set(moe_lens.__all__) <= set(dir(moe_lens))
    for name in moe_lens.__all__:
        assert getattr(moe_lens, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    import moe_lens

    with pytest.raises(AttributeError, match="no_such_name"):
        moe_lens.no_such_name  # noqa: B018

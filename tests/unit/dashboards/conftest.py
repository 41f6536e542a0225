"""What tests of the app share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moe_lens_dashboards

APP = Path(moe_lens_dashboards.__file__).with_name("app.py")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens the app on folders, at the parameters of a link."""
    import streamlit as st
    from streamlit.testing.v1 import AppTest

    from moe_lens_dashboards.components import runs

    st.cache_data.clear()
    st.cache_resource.clear()

    def start(*places: Path, **link: str) -> AppTest:
        monkeypatch.setenv(runs.RUNS, json.dumps([str(p) for p in places]))
        app = AppTest.from_file(str(APP), default_timeout=60)
        for name, value in link.items():
            app.query_params[name] = value
        return app.run()

    return start

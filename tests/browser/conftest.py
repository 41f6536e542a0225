"""A browser, the dashboard on a small run recorded here, and a page that is watched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dashboard import Watch, browser, served, tracebacks
from support.models import EXPERTS, VOCAB, build
from support.truth import spy

import moe_lens

STEPS, BATCH, LENGTH = 6, 2, 24
TAGS = ["<b>bold</b> & \"q\" $x$ 'y'", "![x](http://198.51.100.1/x.png)<img src=//198.51.100.1/y>"]


@dataclass
class Recorded:
    """A run, and what its experts were given, seen apart from moe_lens."""

    path: Path
    tokens: int
    routed: dict[int, list[int]]
    """Choices of each expert by layer, counted one by one."""


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    path = tmp_path_factory.mktemp("traces") / "run it's <1>"
    model = build("mixtral")
    generator = torch.Generator().manual_seed(1)
    with spy(model) as calls, moe_lens.record(model, path, tokens=1.0, token_ids=True) as rec:
        for _ in range(STEPS):
            ids_BS = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
            with rec.step(tags=TAGS), torch.no_grad():
                model(input_ids=ids_BS)
    modules = sorted({name for name, _, _ in calls})
    routed = {layer: [0] * EXPERTS for layer in range(len(modules))}
    for name, ids_TK, _ in calls:
        for row in ids_TK.tolist():
            for expert in row:
                routed[modules.index(name)][expert] += 1
    return Recorded(path, STEPS * BATCH * LENGTH, routed)


@pytest.fixture(scope="session")
def address(recorded: Recorded) -> Iterator[str]:
    with served(recorded.path) as url:
        yield url


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    with browser() as launched:
        yield launched


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A fresh page. Afterwards: no request left the machine, and nothing failed on it."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    made = context.new_page()
    made.set_default_timeout(60_000)
    watch = Watch(made)
    yield made
    try:
        assert tracebacks(made) == []
        assert watch.outside == []
        assert watch.errors == []
    finally:
        context.close()

"""Choosing a request in a real browser: its numbers are those that the experts were given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from support.dashboard import served, settled
from support.models import EXPERTS, LAYERS, VOCAB, build
from support.truth import spy

import moe_lens

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]

BATCH, LENGTH, STEPS = 2, 12, 3
TAGS = ["<b>bold</b> $x$", 'it\'s "q"']
ROW, HEAD = 35, 37
"""Pixels of a row of a table, and of its head."""
CELLS = """() => {
  const plot = document.querySelector(".js-plotly-plot:has(.heatmaplayer .hm)");
  return Array.from(plot._fullData[0].z, (row) => Array.from(row));
}"""


@dataclass
class Sequence:
    """One sequence, as the experts and `rec.loss` were given it."""

    chosen: Counter[tuple[int, int]]
    """Tokens by layer and expert."""
    first: list[list[int]]
    """The experts of its first token by layer."""
    loss: float


@dataclass
class Run:
    path: Path
    sequences: list[Sequence]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("requests") / "run", [])
    model = build("mixtral")
    generator = torch.Generator().manual_seed(3)
    with moe_lens.record(model, made.path, tokens=1.0) as rec:
        for _ in range(STEPS):
            ids_BS = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
            loss_BS = torch.rand((BATCH, LENGTH), generator=generator)
            with spy(model) as calls, rec.step(tags=TAGS), torch.no_grad():
                model(input_ids=ids_BS)
                rec.loss(loss_BS)
            for b in range(BATCH):
                chosen: Counter[tuple[int, int]] = Counter()
                first = []
                for layer, (_, ids_TK, _) in enumerate(calls):
                    mine = ids_TK.tolist()[b * LENGTH : (b + 1) * LENGTH]
                    first.append(mine[0])
                    chosen.update((layer, expert) for row in mine for expert in row)
                loss = sum(loss_BS[b].tolist()) / LENGTH
                made.sequences.append(Sequence(chosen, first, loss))
    return made


@pytest.fixture(scope="module")
def address(run: Run) -> Iterator[str]:
    with served(run.path) as url:
        yield url


def tile(page: Any, label: str) -> str:
    named = page.get_by_test_id("stMetricLabel").get_by_text(label, exact=True)
    metric = page.get_by_test_id("stMetric").filter(has=named)
    return str(metric.get_by_test_id("stMetricValue").inner_text())


def choose(page: Any, row: int) -> None:
    """Tick a row of the table of sequences."""
    table = page.get_by_test_id("stDataFrame").nth(1)
    table.click(position={"x": 16, "y": HEAD + ROW * row + ROW // 2})


def agrees(page: Any, sequence: int, expected: Sequence) -> None:
    page.get_by_role("heading", name=f"Sequence {sequence}", exact=True).wait_for()
    settled(page)
    assert parse_qs(urlsplit(page.url).query)["sequence"] == [f"0:{sequence}"]
    assert tile(page, "Tokens") == str(LENGTH)
    assert tile(page, "Experts used") == str(len(expected.chosen))
    assert tile(page, "Loss") == f"{expected.loss:.3f}"
    page.locator(".js-plotly-plot .heatmaplayer .hm").first.wait_for(state="attached")
    highest = max(expert for _, expert in expected.chosen)
    assert page.evaluate(CELLS) == [
        [expected.chosen[layer, expert] for expert in range(highest + 1)] for layer in range(LAYERS)
    ]
    assert highest < EXPERTS


def test_choosing_a_request_draws_it(page: Any, address: str, run: Run) -> None:
    page.goto(f"{address}/requests")
    settled(page)
    choose(page, 2)
    agrees(page, 2, run.sequences[2])
    choose(page, 5)
    agrees(page, 5, run.sequences[5])
    # The browser's way back, and the link, bring the same view.
    page.go_back()
    agrees(page, 2, run.sequences[2])
    page.reload()
    agrees(page, 2, run.sequences[2])
    assert page.locator("b", has_text="bold").count() == 0


def test_its_tokens_are_those_that_were_routed(page: Any, address: str, run: Run) -> None:
    page.goto(f"{address}/requests?sequence=0:3")
    settled(page)
    table = page.get_by_test_id("stDataFrame").nth(2)
    # The picture of a table is one canvas: these are the cells that a screen reader is told of.
    table.locator("[role=gridcell]").first.wait_for(state="attached")
    row = table.locator("[role=row]:has([role=gridcell])").first
    row = row.locator("[role=gridcell]").all_text_contents()
    experts = [sorted(map(int, text.split(", "))) for text in row[-LAYERS:]]
    assert experts == [sorted(ids) for ids in run.sequences[3].first]

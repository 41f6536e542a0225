"""A small corpus and a small model, so that every test here runs in a second or two."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from moe_lens.demo.corpus import Domain, split
from moe_lens.demo.model import MoEConfig

SMALL = MoEConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    moe_intermediate_size=16,
    ngram_buckets=512,
)


class ListRecorder:
    """Keeps what it is told, in place of a trace."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, list[str]]] = []
        self.losses: list[torch.Tensor] = []

    def step(self, *, tags: list[str], phase: str) -> AbstractContextManager[None]:
        self.steps.append((phase, list(tags)))
        return nullcontext()

    def loss(self, loss_BS: torch.Tensor, /) -> None:
        self.losses.append(loss_BS.detach().clone())

    def scalars(self) -> dict[str, float]:
        return {"moe/layer0/dropped_share": 0.1, "moe/layer1/dropped_share": 0.3}


@pytest.fixture
def config() -> MoEConfig:
    return SMALL


@pytest.fixture
def recorder() -> Any:
    return ListRecorder()


@pytest.fixture(scope="session")
def corpus() -> list[Domain]:
    texts = {"digits": b"0123456789 ", "letters": b"the cat sat on the mat. "}
    # One line a document, each with its number, so that none is a copy of another.
    return [
        split(tag, [(f"{tag}{i}", f"{i} ".encode() + text * 200) for i in range(20)])
        for tag, text in texts.items()
    ]

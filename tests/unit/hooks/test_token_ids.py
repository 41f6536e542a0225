"""Vocabulary ids that were asked for: kept, or said to be missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import VOCAB, build

import moe_lens


def test_ids_are_kept_in_the_order_of_the_tokens(tmp_path: Path) -> None:
    model, ids_BS = build("mixtral"), torch.arange(8).reshape(2, 4) % VOCAB
    with moe_lens.record(model, tmp_path / "run", tokens=1.0, token_ids=True):
        model(input_ids=ids_BS)
    with moe_lens.open(tmp_path / "run") as trace:
        rows = trace.sql("select token_id from tokens order by token").rows()
    assert [r["token_id"] for r in rows] == ids_BS.flatten().tolist()


def test_ids_that_nobody_gave_are_warned_of_and_counted(tmp_path: Path) -> None:
    model = build("mixtral")
    with (
        pytest.warns(UserWarning, match="token_ids=True, and a forward was given none"),
        moe_lens.record(model, tmp_path / "run", tokens=1.0, token_ids=True),
    ):
        for _ in range(2):
            model(inputs_embeds=torch.randn(2, 4, model.config.hidden_size))
    with moe_lens.open(tmp_path / "run") as trace:
        assert trace.sql("select count(token_id) as n from tokens").rows() == [{"n": 0}]
        ((said, times),) = trace.info().runs[0].warnings.items()
    assert said.startswith("token_ids=True")
    assert times == 2

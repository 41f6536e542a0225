"""What a model's config.json says of its experts: against transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from moe_lens.errors import ImportRefused
from moe_lens.importers.model_config import from_config

KNOWN: dict[str, tuple[dict[str, Any], tuple[int, int | None, tuple[int, ...] | None]]] = {
    "qwen3_moe": (
        {
            "num_hidden_layers": 4,
            "num_experts": 16,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [1],
        },
        (16, 3, (1,)),
    ),
    "qwen2_moe": (
        {"num_hidden_layers": 4, "num_experts": 16, "decoder_sparse_step": 2},
        (16, 4, (0, 2)),
    ),
    "mixtral": ({"num_hidden_layers": 2}, (8, 2, ())),
    "deepseek_v3": (
        {"num_hidden_layers": 6, "n_routed_experts": 32, "first_k_dense_replace": 3},
        (32, 8, (0, 1, 2)),
    ),
    "olmoe": ({"num_hidden_layers": 3}, (64, 8, ())),
    "gpt_oss": ({"num_hidden_layers": 2}, (128, 4, ())),
    "glm4_moe": ({"num_hidden_layers": 3, "first_k_dense_replace": 1}, (128, 8, (0,))),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_it_reads_what_transformers_writes(kind: str, tmp_path: Path) -> None:
    changes, (experts, top_k, dense) = KNOWN[kind]
    AutoConfig.for_model(kind, **changes).save_pretrained(tmp_path)
    given = from_config(tmp_path)
    assert (given.experts, given.top_k, given.dense_blocks) == (experts, top_k, dense)
    assert given.blocks == changes["num_hidden_layers"]
    assert given == from_config(tmp_path / "config.json")


def test_numbers_of_the_language_model_inside_another_are_found(tmp_path: Path) -> None:
    text = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64}
    said = {"architectures": ["SeesAndSpeaks"], "text_config": text, "hidden_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(said))
    given = from_config(tmp_path)
    assert (given.experts, given.top_k, given.hidden_size) == (8, 2, 64)
    assert given.model == "SeesAndSpeaks"
    assert given.dense_blocks is None  # it does not say how many blocks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no model configuration: it is a list"),
        ("[" * 100_000, "is no JSON"),
        (
            '{"num_experts": 4, "num_hidden_layers": 2, "mlp_only_layers": 1}',
            "mlp_only_layers is 1, not a list of blocks",
        ),
        ('{"hidden_size": 8}', "says nothing of experts"),
        ('{"num_experts": "many"}', "num_experts is 'many', not a number"),
        ('{"num_experts": -1}', "num_experts is -1, not a number"),
        ('{"num_experts": true}', "num_experts is True, not a number"),
    ],
)
def test_what_says_nothing_of_experts_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ImportRefused, match=message):
        from_config(tmp_path)


def test_no_block_is_dense_that_is_not_there(tmp_path: Path) -> None:
    said = {"num_experts": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1 << 40}
    (tmp_path / "config.json").write_text(json.dumps(said | {"architectures": "Qwen"}))
    assert from_config(tmp_path).dense_blocks == (0, 1, 2)
    assert from_config(tmp_path).model is None


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"config.json cannot be read"):
        from_config(tmp_path)

"""What a recorded generation exports is what its experts received."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from support.truth import spy
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_lens
from moe_lens.exporters.exporting import export_trace
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Given


def tiny() -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config).eval()


def test_a_generation_has_s_minus_1_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny()
    prompts_BS = torch.randint(1, 60, (3, 5))
    mask_BS = torch.ones_like(prompts_BS)
    mask_BS[1, :2] = 0  # padding on the left: its first token stands in column 2
    with (
        spy(model) as calls,
        moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec,
        rec.step(tags=["a", "b", "a"]),
        torch.no_grad(),
    ):
        model.generate(
            input_ids=prompts_BS, attention_mask=mask_BS, max_new_tokens=4, do_sample=False
        )
    ids = [ids_TK for _, ids_TK, _ in calls]
    by_layer = [torch.cat([x.reshape(3, -1, 2) for x in ids[layer::2]], 1) for layer in (0, 1)]
    truth_BSLK = torch.stack(by_layer, 2).numpy()
    assert truth_BSLK.shape == (3, 5 + 4 - 1, 2, 2)
    done = export_trace(tmp_path / "run", tmp_path / "out", "npy")
    assert done.left_out == {}
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [(x["tag"], x["prompt_tokens"], x["tokens"]) for x in index["sequences"]] == [
        ("a", 5, 8), ("b", 3, 6), ("a", 5, 8),
    ]  # fmt: skip
    for x in index["sequences"]:
        got = np.load(tmp_path / "out" / x["file"])
        expected = truth_BSLK[x["sequence"], 8 - x["tokens"] :]
        assert got.tolist() == expected.tolist()


def test_a_recording_and_its_import_route_alike(tmp_path: Path) -> None:
    """Out through an engine's format and in again: a recorded run beside an imported one."""
    torch.manual_seed(0)
    model = tiny()
    prompts_BS = torch.randint(1, 60, (3, 12))
    with moe_lens.record(model, tmp_path / "run", tokens=1.0, token_ids=True) as rec:
        for _ in range(2):
            with rec.step(tags=["a", "b", "a"]), torch.no_grad():
                model(input_ids=prompts_BS)
    export_trace(tmp_path / "run", tmp_path / "out.jsonl", "vllm-responses")
    given = Given(experts=6)
    import_trace(tmp_path / "out.jsonl", tmp_path / "again", format="vllm", given=given)
    for first, second in (("run", "again"), ("again", "run")):
        found = moe_lens.diff(tmp_path / first, tmp_path / second, by="position")
        assert found.tokens == 72
        assert found.flip_rate == 0
        assert found.layers["weight_diff_mean"].isna().all()
        assert [name for name in found.no_weights if "again" in name]

"""moe-policylang's own recorder and writer: what they write is what is imported."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from moe_policylang.integrations.trace_recorder import TraceEntry, TraceRecording, record_trace
from moe_policylang.integrations.vllm_extensions import save_session_as_trace
from support.engines import policylang
from support.routed import counted, routed
from support.truth import spy
from transformers import BatchEncoding, OlmoeConfig, OlmoeForCausalLM

import moe_lens
from moe_lens.importers.formats import moe_policylang
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Given

NAMES = ("trace.parquet", "trace.jsonl")
PROMPTS = ("hello", "abc")


class Letters:
    """A tokenizer of letters."""

    pad_token_id = 0
    eos_token_id = 63

    def __call__(self, prompt: str, **_: Any) -> BatchEncoding:
        ids = torch.tensor([[1 + ord(c) % 60 for c in prompt]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def tiny() -> OlmoeForCausalLM:
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=6,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
    ).eval()


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_builder_writes_what_the_package_writes(tmp_path: Path, name: str, full: bool) -> None:
    of = policylang.recorded(full=full)
    header = of.header()
    recording = TraceRecording(
        header["model_name"],
        header["num_layers"],
        header["num_experts"],
        header["top_k"],
        [TraceEntry(**row) for row in of.rows],
        records_full_softmax=header["records_full_softmax"],
    )
    theirs, ours = tmp_path / f"theirs-{name}", tmp_path / f"ours-{name}"
    recording.save(theirs)
    policylang.write(ours, of)
    if name.endswith(".jsonl"):
        assert ours.read_bytes() == theirs.read_bytes()
    else:
        assert pq.read_table(ours).equals(pq.read_table(theirs))
        assert pq.read_schema(ours) == pq.read_schema(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_recorded_is_what_the_experts_received(tmp_path: Path, name: str) -> None:
    model, path = tiny(), tmp_path / name
    with spy(model) as calls:
        record_trace(
            model,
            Letters(),
            PROMPTS,
            str(path),
            max_new_tokens=3,
            record_full_softmax=True,
            record_token_ids=True,
            record_phase=True,
            record_router_logits=True,
            record_token_loss=False,
            prompt_domain_tags=["code", "chat"],
        )
        ran = [(module, ids.tolist()) for module, ids, _ in calls]
    done = import_trace(path, tmp_path / "run")
    # Prompt by prompt: all its tokens, then one by one (the last that is generated never runs).
    truth: dict[tuple[int, int], list[list[int]]] = {}
    rest = iter(ran)
    for number, prompt in enumerate(PROMPTS):
        for first in (0, len(prompt), len(prompt) + 1):
            for _ in range(3):
                for t, ids in enumerate(next(rest)[1]):
                    truth.setdefault((number, first + t), []).append(ids)
    assert next(rest, None) is None
    got = routed(done.run)
    assert got.keys() == truth.keys()
    assert {k: [sorted(x) for x in ids.tolist()] for k, ids in got.items()} == {
        k: [sorted(x) for x in ids] for k, ids in truth.items()
    }
    expected = Counter(
        (layer, e) for ids_LK in truth.values() for layer, ids in enumerate(ids_LK) for e in ids
    )
    assert counted(done.run) == expected
    with moe_lens.open(done.run) as trace:
        steps: Any = trace.sql("select step, forward, phase, tokens from steps order by all").rows()
    assert [tuple(r.values()) for r in steps] == [
        (0, 0, "prefill", 5), (0, 1, "decode", 1), (0, 2, "decode", 1),
        (1, 0, "prefill", 3), (1, 1, "decode", 1), (1, 2, "decode", 1),
    ]  # fmt: skip


def test_a_session_of_vllm_has_no_distribution(tmp_path: Path) -> None:
    events = [
        {"layer_idx": layer, "indices": [[0, 3], [2, 1], [4, 5]], "weights": [[0.7, 0.3]] * 3}
        for layer in (0, 1)
    ]
    path = tmp_path / "session.parquet"
    save_session_as_trace(events, path, num_experts=6, top_k=2, num_layers=2)
    source = moe_policylang.open_source(path, Given())
    assert moe_policylang.MADE_UP in source.notes
    assert "entropy" in source.lacks
    done = import_trace(path, tmp_path / "run")
    assert {k: x.tolist() for k, x in routed(done.run).items()} == {
        (0, t): [ids, ids] for t, ids in enumerate([[0, 3], [2, 1], [4, 5]])
    }

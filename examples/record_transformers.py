"""Record a transformers model while it is evaluated and while it generates, then ask in SQL.

    python examples/record_transformers.py [RUN]

The model is a small random Qwen3-MoE, so that nothing has to be downloaded: put your own in its
place.
"""

import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_lens

run = sys.argv[1] if len(sys.argv) > 1 else "traces/qwen3_moe"
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=16,
    num_experts_per_tok=4,
)
model = Qwen3MoeForCausalLM(config).eval()
batch = torch.randint(1, 256, (8, 32))
domains = ["code"] * 4 + ["prose"] * 4

with moe_lens.record(model, run, tokens=0.5) as rec, torch.no_grad():
    for _ in range(3):
        with rec.step(tags=domains):
            logits = model(input_ids=batch).logits
            rec.loss(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none"
                )
            )
    with rec.step(tags=domains, sequences=[f"request {i}" for i in range(8)]):
        model.generate(batch, max_new_tokens=8, do_sample=False, pad_token_id=0)

trace = moe_lens.open(run)
print(trace.info())
print(trace.query("hottest_experts", top=2))
print(
    trace.sql(
        "select phase, layer, max(max_load) as hottest, sum(touched) as touched "
        "from layers group by phase, layer order by phase, layer limit 8"
    )
)

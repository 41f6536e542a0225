"""Ask a trace: four stored questions, and SQL of your own.

    python examples/ask_sql.py [RUN]

RUN is a trace to ask. Where there is none yet, a small random Qwen3-MoE is recorded there first:
two kinds of requests, every token's row, vocabulary ids and losses.
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_lens

run = Path(sys.argv[1] if len(sys.argv) > 1 else "traces/ask_sql")


def record():
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
    digits, letters = torch.randint(48, 58, (4, 64)), torch.randint(97, 123, (4, 64))
    batch, kinds = torch.cat([digits, letters]), ["digits"] * 4 + ["letters"] * 4
    with moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec, torch.no_grad():
        for _ in range(3):
            with rec.step(tags=kinds, phase="eval"):
                logits = model(input_ids=batch).logits
                rec.loss(
                    torch.nn.functional.cross_entropy(
                        logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none"
                    )
                )


if not (run / "meta").exists():
    record()

with moe_lens.open(run) as trace:
    print("The two experts that each tag favours most:")
    hottest = trace.query("hottest_experts", top=2)
    print(hottest, "\n")
    top = hottest.rows()[0]
    where = {"layer": top["layer"], "expert": top["expert"]}

    print(f"Token ids for which {top['tag']}'s first, {where}, is special:")
    serves = trace.query("expert_serves", **where, top=5).df()
    print(serves[serves["kind"] == "token id"].to_string(index=False), "\n")

    print("The experts that serve the same tokens:")
    print(trace.query("expert_companions", **where, top=3), "\n")

    print("How often a token is routed as the token before it (lift 1: chance):")
    print(trace.query("repetition"), "\n")

    print("SQL: layers by how much the largest gate weight takes, from kept rows:")
    print(
        trace.sql(
            "select r.layer, count(*) as tokens, avg(r.weights[1]) as first_weight "
            "from routing as r join tokens as t using (run, rank, step, forward, token) "
            "where not t.padding and t.tag = $tag group by r.layer order by r.layer",
            tag=top["tag"],
        )
    )

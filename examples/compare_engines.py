"""Record one model in two engines and two precisions, and see where its routing differs.

    python examples/compare_engines.py [RUN]

The model is a small random Qwen3-MoE, so that nothing has to be downloaded: put your own in its
place. Then the fp32 routing is forced on the bf16 model: what is left of the difference is
arithmetic, the rest was tokens that went to other experts.
"""

import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_lens

run = sys.argv[1] if len(sys.argv) > 1 else "traces/compare"
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
for parameter in model.parameters():  # wider than a new model's, so that routers have an opinion
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=0.1)
batch = torch.randint(0, 256, (8, 64))


def logits(path=None):
    """What the model says, and where its tokens go."""
    with torch.no_grad():
        if path is None:
            return model(input_ids=batch).logits.float()
        with moe_lens.record(model, path, tokens=1.0, weights="exact", token_ids=True):
            return model(input_ids=batch).logits.float()


model.set_experts_implementation("eager")
exact = logits(run)
model.set_experts_implementation("grouped_mm")
grouped = logits(f"{run}_grouped")
model.to(torch.bfloat16)
rounded = logits(f"{run}_bf16")

for name, other in (("grouped", grouped), ("bf16", rounded)):
    found = moe_lens.diff(run, f"{run}_{name}")
    print(f"eager fp32 against {name}: logits differ by {(other - exact).abs().mean():.2g},")
    print(
        f"  {found.flip_rate:.2%} of token-layers have other experts, overlap {found.overlap:.4f}"
    )
    print(found.layers[["layer", "flip_rate", "overlap", "margin", "margin_at_flips"]], "\n")

with moe_lens.force_routing(model, run):
    forced = logits()
print(f"bf16 with the routing of fp32: logits differ by {(forced - exact).abs().mean():.2g}")
print(f"the same on a page: moe-lens diff {run} {run}_bf16")

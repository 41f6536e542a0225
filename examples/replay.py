"""Record a model in prefill and decoding, and ask what its routing costs on this machine.

    python examples/replay.py [RUN]

The model is a small random OLMoE, so that nothing has to be downloaded: put your own in its place.
Every token is recorded (tokens=1.0), since a batch is replayed as it was, with random weights of
any size. Then the same routing under a capacity, and with fewer experts a token.
"""

import sys

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_lens
from moe_lens.replay.policies import Policy
from moe_lens.replay.session import replay
from moe_lens.replay.settings import Settings

run = sys.argv[1] if len(sys.argv) > 1 else "traces/replay"
torch.manual_seed(0)
config = OlmoeConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts=16,
    num_experts_per_tok=4,
    pad_token_id=0,
    eos_token_id=1,
)
model = OlmoeForCausalLM(config).eval()
for parameter in model.parameters():  # wider than a new model's, so that routers have an opinion
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=0.1)

with moe_lens.record(model, run, tokens=1.0), torch.no_grad():
    prompt = torch.randint(2, 256, (4, 64))
    model.generate(prompt, max_new_tokens=12, do_sample=False)

# Sizes of your choice; without them the model's own. On a GPU: device="cuda".
size = {"hidden": 256, "intermediate": 128, "seconds": 5.0, "device": "cpu"}


def show(title, policy):
    """What a layer takes under a policy, and what a balanced routing would take."""
    print(f"\n{title}")
    found = replay(run, Settings(policy=policy, **size))
    for row in found.by_layer():
        print(
            f"  {row['phase']:8} layer {row['layer']}: {row['p50_ns'] / 1e3:7.0f} µs, balanced "
            f"{row['balanced_ns'] / 1e3:7.0f} µs, A/A noise {row['noise']:.1%}, "
            f"{row['touched']:g} experts touched, {row['dropped']:,} of {row['slots']:,} dropped"
        )
    print(*found.answers(), sep="\n")
    return found


found = show("As it was recorded", Policy())
show(
    "With a capacity factor of 1, and the runners-up where an expert is full",
    Policy("reroute", 1.0),
)
show("With two experts a token", Policy(top_k=2))
print(f"\nRows of every forward: {found.path}")

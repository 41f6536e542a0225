# %% [markdown]
# # Look at a run in a notebook
#
# Open this file in Jupyter (with jupytext) or VS Code: each `# %%` is a cell, and what a cell ends
# with displays itself. As a script it prints the facts of the run: `python examples/look.py [RUN]`.

# %%
import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_lens
from moe_lens.figures.expert_tags import expert_tags
from moe_lens.figures.load_heatmap import load_heatmap
from moe_lens.figures.router_over_time import router_over_time
from moe_lens.figures.theme import dressed

named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")  # a notebook has arguments of its own
run = sys.argv[1] if named else "traces/look"

# %% [markdown]
# A small random model, so that nothing has to be downloaded: put your own in its place.

# %%
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
with moe_lens.record(model, run, tokens=1.0) as rec, torch.no_grad():
    for _ in range(10):
        with rec.step(tags=["low bytes", "high bytes"]):
            low = torch.randint(0, 128, (1, 64))
            model(input_ids=torch.cat([low, low + 128]))

# %%
trace = moe_lens.open(run)
trace  # noqa: B018  (a notebook displays it)

# %%
trace.query("hottest_experts", top=3)

# %%
load_heatmap(trace.query("load_map").df())

# %% [markdown]
# Every figure takes the answer of one stored question, and has a light and a dark look.

# %%
hottest = trace.query("hottest_experts", top=1).df().iloc[0]
where = {"layer": int(hottest["layer"]), "expert": int(hottest["expert"])}
dressed(expert_tags(trace.query("expert_tags", **where).df()), dark=True)

# %%
router_over_time(trace.query("router_over_time", by_tag=True).df(), "entropy_norm")

# %%
print(trace.info())

"""Train the demo's model for some seconds, and ask what its routing owes to the order of a prompt.

    python examples/context.py [RUN [STEPS]]

The same text is read twice, the second time with its halves changed over, and some of it once more
as it stands. And of every text: how much of its later routing its beginning foretells.
"""

import sys

import torch

import moe_lens
from moe_lens.demo.batches import as_tokens, held_out_windows
from moe_lens.demo.corpus import load_corpus
from moe_lens.demo.model import MoEConfig, MoELanguageModel
from moe_lens.demo.train import Recipe, train
from moe_lens.queries.context import conversations
from moe_lens.queries.paired import paired

run = sys.argv[1] if len(sys.argv) > 1 else "traces/context"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 12
torch.manual_seed(0)
corpus = load_corpus()
model = MoELanguageModel(MoEConfig())
with moe_lens.record(model, f"{run}-training", tokens=0.0) as recorder:
    train(model, corpus, recorder, Recipe(steps=steps), lambda progress: None)
model.eval()

keys = ["pair", "variant"]
with moe_lens.record(model, run, tokens=1.0, token_ids=True, keys=keys) as recorder:
    for domain in corpus:
        text_BS = as_tokens(held_out_windows(domain, 4, 128))
        swapped_BS = text_BS.roll(64, dims=1)  # the second half first
        pair = [f"{domain.tag} {n}" for n in range(len(text_BS))]
        for variant, prompt_BS in (("a", text_BS), ("b", swapped_BS), ("a", text_BS)):
            with (
                recorder.step(
                    tags=[domain.tag] * len(pair),
                    phase="eval",
                    keys={"pair": pair, "variant": [variant] * len(pair)},
                ),
                torch.no_grad(),
            ):
                model(prompt_BS)

# Popularity is of the other sequences: a trace for it holds no text twice.
with moe_lens.record(model, f"{run}-texts", tokens=1.0) as recorder, torch.no_grad():
    for domain in corpus:
        text_BS = as_tokens(held_out_windows(domain, 8, 128))
        with recorder.step(tags=[domain.tag] * len(text_BS), phase="eval"):
            model(text_BS)

with moe_lens.open(run) as trace:
    found = paired(trace)
with moe_lens.open(f"{run}-texts") as trace:
    measured = list(conversations(trace, prefixes=(16, 64), after=16))

shown = ["layer", "pairs", "overlap", "set_changed", "same_changed", "id_overlap", "random_overlap"]
print(found.layers[shown].round(3).to_string(index=False))
shown = ["layer", "id_part", "content_part", "order_part", "context_independence"]
print(found.layers[shown].round(3).to_string(index=False))
by_distance = found.by_distance.pivot(index="layer", columns="first", values="set_changed")
print("tokens with another set, by their distance from the cut", by_distance.round(2), sep="\n")
for each in measured:
    half = each.info.experts // 2
    for beginning in each.foretold:
        row = beginning.recall.iloc[half - 1]
        print(
            f"layer {each.info.layer}: {half} experts named by {beginning.prefix:.0f} tokens find "
            f"{row['prefix']:.1%} of what follows, by popularity {row['popularity']:.1%}, at best "
            f"{row['oracle']:.1%}"
        )

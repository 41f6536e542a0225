"""What a serving engine recorded, as a trace: SQL, placement and replay for it.

    python examples/import_engine_trace.py [RUN] [FILE]

FILE is what SGLang answered (`--enable-return-routed-experts`; JSON lines of /generate). Without
one, answers in its layout are made up here. Files of the other engines are read in the same way:
docs/import.md.
"""

import base64
import json
import sys
from pathlib import Path

import numpy as np

import moe_lens
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Given

run = Path(sys.argv[1] if len(sys.argv) > 1 else "traces/served")
file = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("answers.jsonl")

# What the answers do not say. `moe-lens import --config config.json` reads it from the model.
model = Given(experts=64, top_k=4, blocks=6, hidden_size=256, intermediate_size=128)

if len(sys.argv) <= 2:
    rng = np.random.default_rng(0)
    popular = -0.7 * np.log(np.arange(1, 65))
    with file.open("w") as f:
        for request in range(200):
            prompt, generated = int(rng.integers(20, 80)), int(rng.integers(5, 40))
            score = popular + rng.gumbel(size=(prompt + generated - 1, 6, 64))  # the last never ran
            ids = np.argsort(-score, axis=2)[:, :, :4].astype("<i4")
            answer = {
                "id": f"request-{request}",
                "prompt_tokens": prompt,
                "completion_tokens": generated,
                "routed_experts": base64.b64encode(ids.tobytes()).decode(),
            }
            f.write(json.dumps({"text": "…", "meta_info": answer}) + "\n")

done = import_trace(file, run, given=model, force=True)
print(f"{done.tokens:,} tokens of {done.sequences} requests, in {done.passes} forwards")
print(f"steps: {done.steps}")
for what, why in done.lacks.items():
    print(f"no {what}: {why}")

with moe_lens.open(run) as trace:
    print(trace.query("hottest_experts", phase="decode", top=3))
    print(
        trace.sql(
            "select request, count(*) as tokens from tokens join sequences using (sequence) "
            "group by request order by tokens desc limit 3"
        )
    )

"""The catalogue as a page: `python -m moe_lens.metrics.page > docs/metrics.md` (make docs-metrics).

docs/metrics.md is this text; a test compares them.
"""

from __future__ import annotations

import sys

from moe_lens.metrics.by_tag import PERMUTATIONS
from moe_lens.metrics.catalogue import GROUPS, Metric, metrics
from moe_lens.metrics.chance import DRAWS, FORWARD_DRAWS
from moe_lens.metrics.evidence import LEVELS

_HEAD = f"""\
# Metrics of routing

Generated from `moe_lens/metrics/` by `make docs-metrics`: each definition stands beside the
function that computes it.

```sh
moe-lens analyze traces/demo --phase eval
moe-lens analyze traces/demo --only balance,z_loss --layers 0-1 --json
```

`moe-lens analyze` prints each metric of each layer beside what chance gives, marks what chance
does not explain, and says which metrics could not be computed and what would have to be recorded.
Phases are measured apart.

## Symbols

T valid tokens (no padding; each once), E experts of a layer that compute, V outputs of the router
(E and zero-compute experts), k choices per token. z logits, p the router's full distribution of a
token (softmax; or sigmoid scores divided by their sum), P the mean of p over tokens. n_i choices
of expert i, N their sum, mu = N / E the mean load. f_i = n_i / N sums to 1, F_i = n_i / T to k: a
published load needs its convention. g gate weights as the experts received them, G_i their sum on
expert i. C choices that an expert takes. Logarithms are natural.

## What chance is

A router that draws each token's k experts uniformly, all sets alike, tokens independent of each
other. Then n_i has the mean mu and the variance mu (1 - k/E), whatever the group limits of a
router. Where the page says *drawn*, the metric is computed on {DRAWS} such draws of the layer's
counts ({FORWARD_DRAWS} of its forwards'), with as many tokens and choices. Where it says
*permuted*, *moved*, *turned* or *shuffled*, the recorded choices stay as they are, or keep every
expert's load, and what the metric looks for is taken out of them, {PERMUTATIONS} times: tags change
places between sequences, ids between tokens, tokens between places. `chance` is the mean of these,
▲ or ▼ a value beyond all of them (by chance one in {DRAWS + 1}, or {FORWARD_DRAWS + 1}, on either
side). Else it is the value named; of these only dead experts, and a correlation beyond its limits,
are marked.

- Tokens of one text are alike, so real counts scatter more than these even where a router prefers
  no expert. And with many tokens a small difference is beyond chance too: look at its size.
- Chance depends on T: of two runs compare what is beyond it, or values at one T. Small batches
  are never balanced.
- Groups that limit a token's choices (`moe_layers.groups`) leave mean and variance as they are,
  but tie the experts of a group together: draws then scatter a little less than they should.
- Where k varies, draws give each token N / T choices, rounded up or down.

## Data

| level | what it is |
|---|---|
{{levels}}

Sums of the router's probability and of gate weights in `load` keep 11 mantissa bits, so that what
is made of them is right to about 0.02 %. Metrics of single forwards look at about 32 of them
(whole steps, drawn evenly), those of single tokens at whole sequences, drawn evenly: about 4,096
tokens of a layer, up to 16,384 where layers are few. Shared experts are in no number; zero-compute
experts only in p. Where a layer has some, P of a whole phase is not known (`expert_load` leaves
them out), nor what is made of it.

A layer in which experts choose their tokens is balanced by that: what is made of choices is not
computed there. Phases, padding, rejected drafts, copies of ranks and recomputed forwards are kept
apart by the trace itself.
"""


def markdown() -> str:
    """The whole page."""
    levels = "\n".join(f"| {code} | {words} |" for code, words in LEVELS.items())
    parts = [_HEAD.replace("{levels}", levels)]
    for group in GROUPS:
        rows = [_row(m) for m in metrics().values() if m.group == group]
        table = [
            "| metric | formula | range | level | what it tells | chance | source |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
        parts.append(f"## {group.capitalize()}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def _row(m: Metric) -> str:
    span = f"{m.range}, {m.unit}" if m.unit else m.range
    of_draws = not m.needs.isdisjoint(("draws_RE", "draws_RFE", "draws_RGE"))
    chance = f"drawn: {m.null}" if of_draws else m.null
    cells = (f"`{m.name}`", m.formula, span, m.level, m.diagnoses, chance, m.source)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(markdown())

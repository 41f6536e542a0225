"""What tests of forced routing share: a batch, random ids, a recording, a look for leftovers."""

from __future__ import annotations

import torch
from torch.overrides import _get_current_function_mode_stack

import moe_lens

TOKENS = torch.arange(10).view(2, 5)


def record(model, path, batches=(TOKENS,), **options):
    """The outputs for these batches, a step each, recorded with all their rows."""
    options = {"tokens": 1.0, "weights": "exact", **options}
    with torch.no_grad(), moe_lens.record(model, path, **options) as rec:
        outs = []
        for batch in batches:
            with rec.step():
                outs.append(model(batch))
    return outs


def random_ids(*shape, experts=6, top_k=2, seed=0):
    """Distinct expert ids `[*shape, top_k]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, experts, generator=generator).argsort(-1)[..., :top_k]


def bare(model):
    """No hook of ours is left, and torch's functions are its own."""
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return not hooked and not _get_current_function_mode_stack()


def of_output(model, batch):
    """A number for each token that shows every change of its own output."""
    x_BSD = model(batch if isinstance(batch, torch.Tensor) else batch["input_ids"])
    return (x_BSD * torch.arange(1, x_BSD.shape[-1] + 1)).sum(-1)

"""Steps that nobody stated: an optimizer makes them, or each forward is one."""

from __future__ import annotations

import torch
from support.models import TinyModel
from support.tables import frame
from torch import nn

from moe_lens_hooks import autosteps


def train(model, optimizer, batch, rounds, accumulate):
    for _ in range(rounds):
        for _ in range(accumulate):
            model(**batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def shape_of(run):
    """Forwards of each step, and their phases."""
    steps = frame(run, "steps")
    return [(len(x), "".join(sorted({p[0] for p in x.phase}))) for _, x in steps.groupby("step")]


def test_an_optimizer_makes_the_steps_of_training(watch, batch, tmp_path):
    model = TinyModel().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watcher = watch()
    train(model, optimizer, batch, rounds=3, accumulate=2)
    model(**batch)  # its step is not made: an evaluation ends it
    model.eval()
    with torch.no_grad():
        model(**batch)
        model(**batch)
    train(model.train(), optimizer, batch, rounds=1, accumulate=3)
    watcher.finish()
    shape = shape_of(tmp_path / "auto" / "TinyModel")
    assert shape == [(2, "t")] * 3 + [(1, "t")] + [(1, "e")] * 2 + [(3, "t")]


def test_an_optimizer_made_after_the_first_forward_counts_from_its_first_step(
    watch, batch, tmp_path
):
    model = TinyModel().train()
    watcher = watch()
    model(**batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train(model, optimizer, batch, rounds=3, accumulate=2)
    watcher.finish()
    shape = shape_of(tmp_path / "auto" / "TinyModel")
    assert shape == [(1, "t")] * 3 + [(2, "t")] * 2


def test_an_optimizer_of_something_else_ends_no_step(watch, batch, tmp_path):
    model, critic = TinyModel().train(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    other = torch.optim.SGD(critic.parameters(), lr=1e-3)
    watcher = watch()
    for _ in range(2):
        for _ in range(2):
            model(**batch).sum().backward()
            critic(torch.ones(2)).sum().backward()
            other.step()
        optimizer.step()
    watcher.finish()
    assert shape_of(tmp_path / "auto" / "TinyModel") == [(2, "t")] * 2


def test_an_optimizer_with_copies_of_the_weights_is_believed(watch, batch, tmp_path):
    model = TinyModel().train()
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=1e-3)
    watcher = watch()
    for _ in range(3):
        for _ in range(2):
            model(**batch).sum().backward()
        for master in masters:
            master.grad = torch.zeros_like(master)
        optimizer.step()
    watcher.finish()
    assert shape_of(tmp_path / "auto" / "TinyModel") == [(1, "t")] * 2 + [(2, "t")] * 2


def test_two_optimizers_of_one_model_make_one_step(watch, batch, tmp_path):
    model = TinyModel().train()
    one = torch.optim.SGD(model.embed.parameters(), lr=1e-3)
    two = torch.optim.AdamW(model.blocks.parameters(), lr=1e-3)
    watcher = watch()
    for _ in range(3):
        model(**batch).sum().backward()
        model(**batch).sum().backward()
        one.step()
        two.step()
    watcher.finish()
    assert shape_of(tmp_path / "auto" / "TinyModel") == [(2, "t")] * 3


def test_a_forward_without_gradients_in_the_middle_of_a_step_is_of_it(watch, batch, tmp_path):
    model = TinyModel().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watcher = watch()
    with torch.no_grad():
        model(**batch)  # no step is open: one of its own
    for _ in range(2):
        model(**batch).sum().backward()
        with torch.no_grad():
            model(**batch)
        optimizer.step()
    watcher.finish()
    assert shape_of(tmp_path / "auto" / "TinyModel") == [(1, "t"), (2, "t"), (2, "t")]


def test_an_optimizer_that_never_steps_is_not_waited_for(watch, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(autosteps, "PATIENCE", 4)
    model = TinyModel().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watcher = watch()
    for _ in range(6):
        model(**batch)
    train(model, optimizer, batch, rounds=2, accumulate=6)  # and yet, when it does
    watcher.finish()
    shape = shape_of(tmp_path / "auto" / "TinyModel")
    assert shape == [(4, "t")] + [(1, "t")] * 8 + [(6, "t")]


def test_checkpointing_in_the_backward_pass_opens_no_step(watch, batch, tmp_path):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(TinyModel):
        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return x

    model = Checkpointed().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watcher = watch()
    train(model, optimizer, batch, rounds=2, accumulate=2)
    watcher.finish()
    run = tmp_path / "auto" / "Checkpointed"
    assert shape_of(run) == [(2, "t")] * 2
    assert frame(run, "steps").tokens.tolist() == [9] * 4


def test_a_compiled_optimizer_steps_unseen(watch, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(autosteps, "PATIENCE", 2)
    model = TinyModel().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    watcher = watch()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        model(**batch).sum().backward()
        step()
    watcher.finish()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert shape_of(tmp_path / "auto" / "TinyModel") == [(2, "t"), (1, "t"), (1, "t")]

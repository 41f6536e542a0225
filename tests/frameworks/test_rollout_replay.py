"""Rollout routing replay: what was decided token by token is replayed in whole training batches."""

from __future__ import annotations

import pytest
import torch
from support.models import VOCAB, build
from support.tables import read
from support.truth import spy

import moe_lens

FAMILIES = ("qwen3_moe", "deepseek_v3")
PROMPTS, NEW = (4, 7, 6), 5


@pytest.fixture(scope="module", params=FAMILIES)
def rollout(request, tmp_path_factory):
    """(family, trace, sequences): three prompts, padded on the left, and what was generated."""
    model = build(request.param)
    torch.manual_seed(2)
    prompt = torch.randint(3, VOCAB, (3, max(PROMPTS)))
    mask = torch.stack([torch.arange(max(PROMPTS)) >= max(PROMPTS) - n for n in PROMPTS]).long()
    trace = tmp_path_factory.mktemp("rollout") / request.param
    record = moe_lens.record(model, trace, tokens=1.0, weights="exact", token_ids=True)
    with torch.no_grad(), record as rec, rec.step(sequences=["a", "b", "c"]):
        out = model.generate(
            prompt * mask, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
            eos_token_id=VOCAB + 1, pad_token_id=0,
        )  # fmt: skip
    return request.param, trace, [row[-n - NEW :] for row, n in zip(out, PROMPTS, strict=True)]


@pytest.fixture
def student(rollout):
    """The model some steps of training later: its routers choose otherwise now."""
    model = build(rollout[0]).train()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return model


def padded(sequences, side="right"):
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(sequences):
        at = slice(len(text)) if side == "right" else slice(ids.shape[1] - len(text), None)
        ids[row, at], mask[row, at] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def decided(trace):
    """Expert ids by (layer, request number, position): a plain loop over the rows."""
    tokens = read(trace, "tokens").to_pandas()
    where = {
        (t.step, t.forward, t.token): (t.sequence, t.position)
        for t in tokens.itertuples()
        if not t.padding
    }
    return {
        (r.layer, *where[r.step, r.forward, r.token]): list(r.expert_ids)
        for r in read(trace, "routing").to_pandas().itertuples()
        if (r.step, r.forward, r.token) in where
    }


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def learn(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_token_goes_where_the_rollout_sent_it(rollout, student, side):
    _, trace, sequences = rollout
    batch = padded(sequences, side)
    with torch.no_grad(), spy(student) as free:
        student(**batch)
    with torch.no_grad(), spy(student) as calls:
        with moe_lens.force_routing(student, trace, by="position") as forced:
            student(**batch)
    wanted, S, flips = decided(trace), batch["input_ids"].shape[1], 0
    for layer, ((_, ids, _), (_, own, _)) in enumerate(zip(calls, free, strict=True)):
        for row, text in enumerate(sequences):
            pads = 0 if side == "right" else S - len(text)
            for position in range(len(text) - 1):
                t = row * S + pads + position
                assert ids[t].tolist() == wanted[layer, row, position]
                flips += set(own[t].tolist()) != set(ids[t].tolist())
    assert flips > 5  # by itself the student would have gone elsewhere
    # the last token of each was never routed: it had no decision
    assert forced.own_tokens == len(sequences)
    assert forced.forced_tokens == sum(map(len, sequences)) - len(sequences)


def test_the_rollout_itself_is_reproduced(rollout):
    family, trace, sequences = rollout
    model = build(family)
    batch = padded(sequences)
    with torch.no_grad():
        free = model(**batch).logits
        with moe_lens.force_routing(model, trace, by="position"):
            assert torch.equal(model(**batch).logits, free)


@pytest.mark.parametrize("by", ["forward", "position"])
def test_generating_again_is_forced_step_by_step(rollout, student, by):
    _, trace, sequences = rollout
    prompts = [text[:-NEW] for text in sequences]
    student.eval()
    with torch.no_grad(), spy(student) as calls:
        with moe_lens.force_routing(student, trace, by=by) as forced:
            # the student may write another text: what is forced is where tokens go
            batch = padded(prompts, "left")
            text = torch.stack([s[-NEW:] for s in sequences])
            cache = None
            for step in range(NEW):
                mask = batch["attention_mask"]
                positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -batch["input_ids"].shape[1] :]
                out = student(
                    **batch, position_ids=positions, past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values
                batch = {
                    "input_ids": text[:, step : step + 1],
                    "attention_mask": torch.cat([mask, mask.new_ones(3, 1)], 1),
                }
    assert forced.forwards == NEW
    assert forced.own_tokens == 0
    wanted, layers = decided(trace), len(calls) // NEW
    for layer in range(layers):
        for step in range(1, NEW):
            for row, n in enumerate(PROMPTS):
                ids = calls[step * layers + layer][1][row].tolist()
                assert ids == wanted[layer, row, n + step - 1]


def test_packed_rows_and_micro_batches_are_the_same_tokens(rollout, student):
    _, trace, sequences = rollout
    wanted = decided(trace)
    packed = {
        "input_ids": torch.cat(sequences)[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in sequences])[None],
    }
    with torch.no_grad(), moe_lens.force_routing(student, trace, by="position") as forced:
        with spy(student) as whole:
            student(**packed)
        forced.rewind()
        with spy(student) as parts:
            for text in sequences:
                student(input_ids=text[None])
        forced.rows(["c", 0])
        with spy(student) as turned:
            student(**padded([sequences[2], sequences[0]]))
    layers = len(whole)
    for layer in range(layers):
        each = torch.cat([parts[i * layers + layer][1] for i in range(3)])
        t = 0
        for row, text in enumerate(sequences):
            for position in range(len(text) - 1):
                ids = wanted[layer, row, position]
                assert whole[layer][1][t + position].tolist() == ids
                assert each[t + position].tolist() == ids
                if row != 1:
                    at = position if row == 2 else len(sequences[2]) + position
                    assert turned[layer][1][at].tolist() == ids
            t += len(text)


# -- gradients -----------------------------------------------------------------------------------


def test_where_the_ids_agree_gradients_are_those_of_a_free_run(rollout):
    family, trace, sequences = rollout
    model, batch = build(family).train(), padded(sequences)
    free = learn(model, batch)
    with moe_lens.force_routing(model, trace, by="position"):
        forced = learn(model, batch)
    assert free.keys() == forced.keys()
    assert all(torch.equal(free[n], forced[n]) for n in free)


def test_routers_learn_unless_their_weights_are_given(rollout, student):
    _, trace, sequences = rollout
    batch = padded(sequences)
    gates = [n for n, _ in student.named_parameters() if n.endswith("gate.weight")]
    assert gates
    with moe_lens.force_routing(student, trace, by="position"):
        inside = learn(student, batch)
    assert all(inside[n].abs().sum() > 0 for n in gates)
    with moe_lens.force_routing(student, trace, by="position", weights="recorded"):
        given = learn(student, batch)
    own = 3  # the last token of each follows its router, which learns of those alone
    assert all(given[n].abs().sum() < inside[n].abs().sum() * own for n in gates)
    assert not torch.equal(given[gates[0]], inside[gates[0]])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", ["one by one", "all forwards first"])
def test_checkpointing_forces_the_same_ids_again(rollout, student, reentrant, order):
    _, trace, sequences = rollout
    batches = [padded([s]) for s in sequences]

    def all_of_them():
        losses = []
        with moe_lens.force_routing(student, trace, by="position"):
            for batch in batches:
                losses.append(student(**batch, labels=batch["input_ids"]).loss)
                if order == "one by one":
                    losses.pop().backward()
            for loss in losses:
                loss.backward()  # the first forward first: not the order of autograd's graph
        return gradients(student)

    student.enable_input_require_grads()
    plain = all_of_them()
    student.activation_checkpointing_enable({"use_reentrant": reentrant})
    again = all_of_them()
    assert all(torch.equal(plain[n], again[n]) for n in plain)


# -- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: [s[0], s[1], s[2][:-3]], "recorded sequences with rows"),
        (lambda s: [*s, s[0]], "4 sequences, but 3 recorded ones of 3 are left"),
        (lambda s: [s[0], torch.cat([s[1], s[1]]), s[2]], "no decision at position 11"),
        (lambda s: [s[1], s[0], s[2]], "Is it another sequence"),
        (lambda s: [s[0], s[1], (s[2] + 1) % VOCAB], "another text"),
    ],
)
def test_another_batch_is_refused(rollout, student, change, says):
    _, trace, sequences = rollout
    with moe_lens.force_routing(student, trace, by="position") as forced:
        if "rows" in says:
            forced.rows(["a", "b", "c"])
            says = "has 8 tokens, but request 'c'"
        with pytest.raises(moe_lens.SteeringError, match=says):
            student(**padded(change(sequences)))
    with pytest.raises(moe_lens.SteeringError, match="no request 'd'"):
        moe_lens.force_routing(student, trace, by="position", sequences=["a", "d"])
    student(**padded(sequences))  # and nothing is left behind


def test_parts_are_replayed_where_they_are_wanted(rollout, student):
    _, trace, sequences = rollout
    longer = [sequences[0][:-4], torch.cat([sequences[1], sequences[1][:3]]), sequences[2]]
    with torch.no_grad():
        with moe_lens.force_routing(student, trace, by="position", partial=True) as forced:
            student(**padded(longer))
    assert forced.own_tokens == 0 + 4 + 1
    assert forced.forced_tokens == sum(map(len, longer)) - 5

"""Loss by slice: against loops, planted effects, and chance that knows of sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_lens
from moe_lens.metrics import quality
from moe_lens.metrics.catalogue import METRICS, Measured, measure, metrics
from moe_lens.metrics.evidence import Evidence
from moe_lens.trace.synthetic import Hot, Spec, generate

E, K = 8, 2
QUALITY = [m for m in metrics().values() if m.group == "quality"]


def texts(seed: int, sequences: int = 40, length: int = 60) -> Evidence:
    """Sequences that differ in their loss, and in how they are routed, for different reasons."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(length // 2, length, sequences)
    sequence_N = np.repeat(np.arange(sequences), sizes)
    loss_N = rng.normal(3, 1, sequences)[sequence_N] + rng.normal(0, 0.5, len(sequence_N))
    logits_NE = rng.normal(0, 2, (sequences, E))[sequence_N] + rng.normal(
        0, 1, (len(sequence_N), E)
    )
    ranked_NE = np.argsort(-logits_NE, axis=1)
    ids_NK = ranked_NE[:, :K]
    z = np.take_along_axis(logits_NE, ranked_NE, 1)
    rate_S = rng.uniform(0, 0.5, sequences)
    return Evidence(
        experts=E,
        outputs=E,
        top_k=K,
        ids_NK=ids_NK,
        counts_E=np.bincount(ids_NK.ravel(), minlength=E),
        sequence_N=sequence_N,
        margin_N=z[:, K - 1] - z[:, K],
        dropped_N=(rng.random(len(sequence_N)) < rate_S[sequence_N]).astype(np.int64),
        loss_N=loss_N,
    )


def changed(known: Evidence, **fields: object) -> Evidence:
    return replace(known, **fields)  # type: ignore[arg-type]


def found(known: Evidence, name: str) -> Measured:
    return measure(METRICS[name], known)


def arrays(known: Evidence) -> tuple[np.ndarray, ...]:
    wanted = (known.loss_N, known.sequence_N, known.ids_NK, known.counts_E, known.margin_N)
    assert all(x is not None for x in (*wanted, known.dropped_N))
    return (*wanted, known.dropped_N)  # type: ignore[return-value]


def test_differences_are_those_of_a_loop() -> None:
    known = texts(0)
    loss, sequence, ids, counts, margin, dropped = arrays(known)
    loss = loss.copy()
    loss[::7] = np.nan  # the last token of a text has none
    ids = ids.copy()
    ids[sequence % 3 == 0, 1] = -1  # chose one expert only
    counts = np.bincount(ids[ids >= 0], minlength=E)
    known = changed(known, loss_N=loss, ids_NK=ids, counts_E=counts)
    groups: dict[str, tuple[list[float], list[float]]] = {
        name: ([], []) for name in ("loss_of_dropped", "loss_at_low_margin", "loss_of_hottest")
    }
    there = sorted(m for m, x in zip(margin, loss, strict=True) if x == x)
    low, high = np.quantile(there, [0.25, 0.75])
    hottest = max(range(E), key=lambda e: counts[e])
    by_sequence: dict[int, list[tuple[float, list[int]]]] = {}
    for t in range(len(loss)):
        by_sequence.setdefault(int(sequence[t]), []).append((loss[t], ids[t].tolist()))
        if loss[t] != loss[t]:
            continue
        groups["loss_of_dropped"][int(dropped[t] == 0)].append(loss[t])
        groups["loss_of_hottest"][int(hottest not in ids[t])].append(loss[t])
        if margin[t] <= low:
            groups["loss_at_low_margin"][0].append(loss[t])
        if margin[t] >= high:
            groups["loss_at_low_margin"][1].append(loss[t])
    for name, (of, against) in groups.items():
        wanted = sum(of) / len(of) - sum(against) / len(against)
        assert found(known, name).value == pytest.approx(wanted), name
    shares, losses = [], []
    for tokens in by_sequence.values():
        chosen = [e for _, each in tokens for e in each if e >= 0]
        shares.append(chosen.count(hottest) / len(chosen))
        losses.append(np.mean([x for x, _ in tokens if x == x]))
    slope, _ = np.polyfit(shares, losses, 1)
    assert found(known, "loss_by_exposure").value == pytest.approx(slope * np.std(shares))


@pytest.mark.parametrize("name", [m.name for m in QUALITY])
def test_sequences_that_resemble_themselves_are_chance(name: str) -> None:
    """Loss and routing both differ by sequence, and have nothing to do with each other.

    Beyond 199 permutations is 1 % on both sides together: of 100 draws 1, and 5 once in 200 times.
    """
    beyond = sum(found(texts(seed), name).beyond != "" for seed in range(100))
    assert beyond <= 5


def test_tokens_taken_for_independent_would_cry_wolf() -> None:
    """The null that this is not: shuffled tokens call most of the same data significant."""
    rng = np.random.default_rng(0)
    wolf = 0
    for seed in range(30):
        known = texts(seed)
        loss, _, ids, counts, _, _ = arrays(known)
        on = (ids == counts.argmax()).any(1)
        drawn = []
        for _ in range(99):
            moved = rng.permutation(on)
            drawn.append(loss[moved].mean() - loss[~moved].mean())
        value = found(known, "loss_of_hottest").value
        wolf += not min(drawn) <= value <= max(drawn)
    assert wolf > 15


def test_what_is_planted_is_found() -> None:
    known = texts(1)
    loss, sequence, ids, counts, margin, dropped = arrays(known)
    on = (ids == counts.argmax()).any(1)
    near = margin <= np.quantile(margin, 0.25)
    share = np.bincount(sequence, on) / np.bincount(sequence)
    for name, more in (
        ("loss_of_dropped", 0.8 * (dropped > 0)),
        ("loss_at_low_margin", 0.8 * near),
        ("loss_of_hottest", 1.5 * on),
        ("loss_by_exposure", 8 * share[sequence]),
    ):
        plain = found(known, name)
        assert plain.beyond == "", name
        worse = found(changed(known, loss_N=loss + more), name)
        better = found(changed(known, loss_N=loss - more), name)
        assert (worse.beyond, better.beyond) == ("high", "low"), name
        assert worse.value - plain.value == pytest.approx(plain.value - better.value)
    with_drops = found(changed(known, loss_N=loss + 0.8 * (dropped > 0)), "loss_of_dropped")
    assert with_drops.value - found(known, "loss_of_dropped").value == pytest.approx(0.8)


def test_permuted_sequences_stay_whole() -> None:
    """With two kinds of sequence every permutation is a mean over whole ones: a loop agrees."""
    sizes = [3, 5, 2, 4, 1, 3, 2]
    sequence = np.repeat(np.arange(7), sizes)
    rng = np.random.default_rng(3)
    loss, dropped = rng.normal(size=20), rng.integers(0, 2, 20)
    chance = found(
        Evidence(experts=2, outputs=2, loss_N=loss, dropped_N=dropped, sequence_N=sequence),
        "loss_of_dropped",
    ).chance
    assert chance is not None
    draws = []
    rng = np.random.default_rng(0)
    parts = np.split(dropped, np.cumsum(sizes)[:-1])
    for _ in range(quality.DRAWS):
        moved = np.concatenate([parts[i] for i in rng.permutation(7)])
        draws.append(loss[moved > 0].mean() - loss[moved == 0].mean())
    assert (chance.low, chance.high) == pytest.approx((min(draws), max(draws)))
    assert chance.expected == pytest.approx(np.mean(draws))


def test_where_there_is_nothing_to_compare() -> None:
    known = texts(2)
    loss, sequence, ids, counts, margin, _ = arrays(known)
    all_dropped = changed(known, dropped_N=np.ones(len(loss), np.int64))
    assert found(all_dropped, "loss_of_dropped").lacks
    flat = changed(known, margin_N=np.full(len(loss), 0.5))
    assert found(flat, "loss_at_low_margin").lacks
    unknown = changed(known, margin_N=np.full(len(loss), np.nan))
    assert found(unknown, "loss_at_low_margin").lacks
    one = changed(
        known, experts=1, ids_NK=np.zeros((len(loss), 1), int), counts_E=np.array([len(loss)])
    )
    assert found(one, "loss_of_hottest").lacks
    assert found(one, "loss_by_exposure").lacks  # all alike
    without = changed(known, loss_N=np.full(len(loss), np.nan))
    empty = Evidence(
        experts=E, outputs=E, loss_N=loss[:0], sequence_N=sequence[:0], ids_NK=ids[:0],
        counts_E=counts, margin_N=margin[:0], dropped_N=sequence[:0],
    )  # fmt: skip
    for metric in QUALITY:
        assert measure(metric, without).lacks, metric.name
        assert measure(metric, empty).lacks, metric.name


def test_every_metric_says_why_it_has_no_value() -> None:
    assert set(quality.UNDEFINED) == {m.name for m in QUALITY}


def test_few_sequences_have_no_permutations() -> None:
    for sequences in (1, 5):
        known = texts(4, sequences=sequences, length=80)
        for metric in QUALITY:
            said = measure(metric, known)
            if not said.lacks:
                assert said.chance is not None
                assert (said.chance.high, said.beyond) == (None, ""), metric.name
    assert found(texts(4, sequences=6), "loss_of_hottest").chance.high is not None  # type: ignore[union-attr]


# ---- tables -------------------------------------------------------------------------------------


def test_slices_against_a_loop() -> None:
    loss = [1.0, 2.0, 3.0, float("nan"), 5.0, 6.0, 8.0]
    tag = ["a", "a", "b", "b", "a", "b", "b"]
    sequence = [0, 0, 0, 0, 1, 1, 2]
    rows = quality.slices(loss, tag, sequence).set_index("slice")
    assert rows["tokens"].to_dict() == {"a": 3, "b": 3}
    assert rows["sequences"].to_dict() == {"a": 2, "b": 3}
    assert rows["loss"].to_dict() == pytest.approx({"a": 8 / 3, "b": 17 / 3})
    assert rows["sequence_loss"].to_dict() == pytest.approx({"a": (1.5 + 5) / 2, "b": 17 / 3})
    assert rows["perplexity"].to_dict() == pytest.approx({"a": np.exp(8 / 3), "b": np.exp(17 / 3)})
    # A resampled mean lies between the sequences' own.
    assert rows.loc["a", "low"] == pytest.approx(1.5)
    assert rows.loc["a", "high"] == pytest.approx(5)


def test_intervals_know_of_sequences() -> None:
    """95 % of them hold the truth; of tokens taken for independent, less than half would."""
    inside = naive = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sequence = np.repeat(np.arange(50), 40)
        loss = 3 + rng.normal(size=50)[sequence] + rng.normal(size=2000)
        (row,) = quality.slices(loss, np.zeros(2000), sequence).to_dict("records")
        inside += row["low"] <= 3 <= row["high"]
        error = loss.std() / np.sqrt(2000)
        naive += abs(loss.mean() - 3) < 1.96 * error
    assert 179 <= inside <= 199  # 190, three standard errors of the count, and 2 % of few clusters
    assert naive < 100


def test_intervals_of_slices_that_few_sequences_have() -> None:
    rows = quality.slices([1.0, 2.0, 3.0], ["once", "all", "all"], [0, 0, 1]).set_index("slice")
    assert np.isnan(rows.loc["once", ["low", "high"]].to_numpy(float)).all()
    assert rows.loc["all", "low"] == 2
    assert quality.slices([], [], []).empty
    assert quality.slices([np.nan], ["a"], [0]).empty
    alone = quality.slices([1.0, 2.0], ["a", "a"], [7, 7])
    assert np.isnan(alone["low"]).all()
    with pytest.raises(ValueError, match=r"a value for each token; got shapes \(2,\), \(1,\)"):
        quality.slices([1.0, 2.0], ["a"], [0, 0])


def test_bins_hold_as_many_as_ties_allow() -> None:
    assert quality.bins([4, 1, 3, 2], 2).tolist() == [1, 0, 1, 0]
    assert quality.bins([1, 1, 1, np.nan], 4).tolist() == [0, 0, 0, -1]
    sizes = np.bincount(quality.bins(np.random.default_rng(0).normal(size=1000)))
    assert sizes.tolist() == [100] * 10
    with pytest.raises(ValueError, match="count=0 must be 1 or more"):
        quality.bins([1.0], 0)


def test_simpson() -> None:
    """Every slice gets better and the mean gets worse: the mix did it."""
    before = pd.DataFrame({"slice": ["easy", "hard"], "tokens": [90, 10], "loss": [1.0, 3.0]})
    after = pd.DataFrame({"slice": ["hard", "easy"], "tokens": [90, 10], "loss": [2.7, 0.9]})
    rows = quality.decompose(before, after).set_index("slice")
    assert rows["quality"].to_dict() == pytest.approx({"easy": -0.05, "hard": -0.15})
    assert rows["quality"].sum() == pytest.approx(-0.2)
    assert rows["mix"].sum() == pytest.approx(0.95 * -0.8 + 2.85 * 0.8) == pytest.approx(1.52)
    assert rows["quality"].sum() + rows["mix"].sum() == pytest.approx(2.52 - 1.2)
    assert (rows["mix"] > 0).all()  # fewer easy ones, and more hard ones: both make it worse
    assert rows["share_after"].to_dict() == {"easy": 0.1, "hard": 0.9}


tables = st.dictionaries(
    st.sampled_from("abcde"),
    st.tuples(st.integers(0, 50), st.floats(-5, 20)),
    min_size=1,
).filter(lambda rows: any(n for n, _ in rows.values()))


def table(rows: dict[str, tuple[int, float]]) -> pd.DataFrame:
    listed = [{"slice": k, "tokens": n, "loss": x} for k, (n, x) in rows.items()]
    return pd.DataFrame(listed)


@settings(max_examples=40, deadline=None)
@given(tables, tables)
def test_nothing_is_left_over(
    a: dict[str, tuple[int, float]], b: dict[str, tuple[int, float]]
) -> None:
    def mean(rows: dict[str, tuple[int, float]]) -> float:
        return sum(n * x for n, x in rows.values()) / sum(n for n, _ in rows.values())

    there, back = quality.decompose(table(a), table(b)), quality.decompose(table(b), table(a))
    total = there["quality"].sum() + there["mix"].sum()
    assert total == pytest.approx(mean(b) - mean(a), abs=1e-9)
    assert back["quality"].sum() == pytest.approx(-there["quality"].sum(), abs=1e-9)
    assert back["mix"].sum() == pytest.approx(-there["mix"].sum(), abs=1e-9)
    # By hand, a slice that is in one only taken at its own loss.
    for row in there.to_dict("records"):
        (n0, l0), (n1, l1) = a.get(row["slice"], (0, 0)), b.get(row["slice"], (0, 0))
        w0, w1 = (n / sum(m for m, _ in x.values()) for n, x in ((n0, a), (n1, b)))
        if n0 and n1:
            assert row["quality"] == pytest.approx((w0 + w1) / 2 * (l1 - l0), abs=1e-9)
        else:
            assert row["quality"] == 0


def test_what_cannot_be_decomposed() -> None:
    one = pd.DataFrame({"slice": ["a"], "tokens": [3], "loss": [1.0]})
    with pytest.raises(ValueError, match="before has no column slice; it has tag, tokens, loss"):
        quality.decompose(one.rename(columns={"slice": "tag"}), one)
    with pytest.raises(ValueError, match="after has slice 'a' twice"):
        quality.decompose(one, pd.concat([one, one]))
    with pytest.raises(ValueError, match="after has no slice with a token and a loss"):
        quality.decompose(one, one.assign(loss=np.nan))


# ---- the stored questions -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "run"
    generate(
        path,
        Spec(layers=2, steps=4, losses=True, capacity_factor=1.0, domain_strength=1.0,
             planted=(Hot(3, share=0.5),), seed=5),
    )  # fmt: skip
    return path


def test_slices_agree_with_loss_by_tag_and_quality_by_tag(run: Path) -> None:
    with moe_lens.open(run) as trace:
        rows = trace.query("sequence_choices").df()
        rows = rows[rows["layer"] == 0] if "layer" in rows else rows
        asked = {q: trace.query(q).df().set_index("tag") for q in ("loss_by_tag", "quality_by_tag")}
    mine = quality.slices(rows["loss"], rows["tag"], rows["sequence"]).set_index("slice")
    for question, answer in asked.items():
        assert mine["loss"].to_dict() == pytest.approx(answer["loss"].to_dict(), rel=1e-5), question
        assert mine["tokens"].to_dict() == answer["loss_tokens"].to_dict()
    assert mine["sequences"].to_dict() == asked["loss_by_tag"]["sequences"].to_dict()


def test_loss_of_dropped_agrees_with_quality_of_dropped(run: Path) -> None:
    from moe_lens.queries.evidence import evidence
    from moe_lens.queries.session import one_run

    with moe_lens.open(run) as trace:
        info = one_run(trace)
        for layer in info.layers:
            known = evidence(trace, info, layer, "train", QUALITY)
            asked = {"first_layer": layer.layer, "last_layer": layer.layer}
            rows = trace.query("quality_of_dropped", **asked).df()
            mean = {
                dropped: np.average(part["loss"], weights=part["tokens"])
                for dropped, part in rows.groupby("dropped")
            }
            assert known.dropped_N is not None
            assert (known.dropped_N > 0).sum() == rows[rows["dropped"]]["tokens"].sum()
            wanted = mean[True] - mean[False]
            assert found(known, "loss_of_dropped").value == pytest.approx(wanted)
            for metric in QUALITY:
                assert not measure(metric, known).lacks, metric.name

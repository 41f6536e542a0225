"""SGLang's recorder: what its own code wrote, what a builder wrote after it, and damaged files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import sglang as made
from support.engines.sglang import DECODE, EXTEND, IDLE, MIXED, Ran, drawn, dump, save, trivial

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats import format_of, sglang
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Counted, Given, Pass, Source

DATA = Path(__file__).parents[3] / "data/engines/sglang"
"""Written by SGLang 0.5.23's own recorder: tests/support/engines/make_sglang.py."""

TRUTH: dict[str, Any] = json.loads((DATA / "truth.json").read_text())
B, K, E = 3, 2, 8
TOP_2 = Given(top_k=K)


def passes(source: Source, rank: int = 0) -> list[Pass]:
    out = list(source.ranks[rank].items())
    assert all(isinstance(x, Pass) for x in out)
    return out  # type: ignore[return-value]


def counted(source: Source, rank: int = 0) -> list[Counted]:
    out = list(source.ranks[rank].items())
    assert all(isinstance(x, Counted) for x in out)
    return out  # type: ignore[return-value]


def choices_of(item: Pass) -> dict[int, list[list[int]]]:
    return {layer: x.ids_TK.tolist() for layer, x in item.choices.items()}


def two_passes(seed: int = 0) -> list[Ran]:
    return [
        Ran(drawn(seed, B, 6, K, E, (0,)), EXTEND, [4, 2], [0, 1, 2, 3, 5, 6]),
        Ran(drawn(seed + 1, B, 2, K, E, (0,)), DECODE, None, [4, 7]),
    ]


def plain_dump(seed: int = 0, **more: Any) -> dict[str, Any]:
    return dump(two_passes(seed), trivial(B, E), **more)


# -- what SGLang's own code wrote ------------------------------------------------------------------


def test_per_token_is_read_to_the_token() -> None:
    source = sglang.open_source(DATA / "per_token.pt", Given())
    found = passes(source)
    ran = [(n, truth) for n, truth in enumerate(TRUTH["per_token"]) if truth]
    assert [x.step for x in found] == [7 + n for n, _ in ran] == [7, 8, 9, 11]
    for item, (_, truth) in zip(found, ran, strict=True):
        assert choices_of(item) == {0: truth["1"], 1: truth["2"]}
    assert [x.phase for x in found] == ["prefill", "decode", "unknown", "decode"]
    assert [(x.layer, x.block, x.experts, x.top_k) for x in source.layers] == [
        (0, 1, E, K),
        (1, 2, E, K),
    ]
    assert source.notes == {"blocks without any choice, taken for dense ones: 0": 1}
    assert "placement" not in source.lacks
    assert {"weights", "entropy", "times", "sequences", "phases"} == set(source.lacks)


def test_tokens_are_pieces_of_sequences() -> None:
    raw = torch.load(DATA / "per_token.pt", weights_only=True)["records"]
    found = passes(sglang.open_source(DATA / "per_token.pt", Given()))
    said = [x.tokens for x in found]
    assert all(x is not None for x in said)
    sequences = [x.sequence_T.tolist() for x in said if x is not None]
    assert sequences == [[0] * 5 + [1] * 3, [2, 3], [4] * 4 + [5], [6, 7, 8]]
    for tokens, i in zip(said, (0, 1, 2, 4), strict=True):
        assert tokens is not None
        assert tokens.token_id_T is not None
        assert tokens.position_T.tolist() == raw[i]["positions"]
        assert tokens.token_id_T.tolist() == raw[i]["input_ids"]


@pytest.mark.parametrize("mode", ["stat", "stat_approx", "per_pass"])
def test_counts_are_those_of_the_hooks(mode: str) -> None:
    source = sglang.open_source(DATA / f"{mode}.pt", TOP_2)
    found = [x for x in counted(source) if x.count_E[0].any()]
    truths = [t for t in TRUTH[mode] if t]
    # The pass without tokens leaves a hole in the buffer: then its rows are not turned.
    for item, truth in zip(found, truths, strict=True):
        for layer, block in ((0, "1"), (1, "2")):
            plain = Counter(e for token in truth[block] for e in token)
            assert item.count_E[layer].tolist() == [plain[e] for e in range(E)]
    assert {x.phase for x in found} == {"unknown"}
    assert "tokens" in source.lacks


def test_the_builder_writes_what_sglang_writes() -> None:
    for name in ("per_token", "per_pass"):
        real = torch.load(DATA / f"{name}.pt", weights_only=True)
        ours = plain_dump(per_token=name == "per_token")
        assert list(real) == list(ours)
        assert real["last_physical_to_logical_map"].dtype == torch.int64
        assert torch.equal(
            real["last_physical_to_logical_map"], ours["last_physical_to_logical_map"]
        )
        for theirs, mine in zip(real["records"], ours["records"], strict=False):
            assert list(theirs) == list(mine)
            for key, value in theirs.items():
                assert type(value) is type(mine[key]), key
                if isinstance(value, torch.Tensor):
                    assert value.dtype == mine[key].dtype
                    assert value.dim() == mine[key].dim()
                    assert value.shape[-1] == mine[key].shape[-1]
    real, ours = torch.load(DATA / "stat.pt", weights_only=True), made.stat(np.ones((1, 1, 1)))
    assert list(real) == list(ours)
    assert real["logical_count"].dtype == ours["logical_count"].dtype


@pytest.mark.parametrize("mode", ["stat", "stat_approx", "per_pass", "per_token"])
def test_it_is_recognised_and_imported(mode: str, tmp_path: Path) -> None:
    assert format_of(DATA / f"{mode}.pt") == "sglang"
    done = import_trace(DATA / f"{mode}.pt", tmp_path / "run", given=TOP_2)
    assert (done.format, done.passes, done.tokens, done.token_layers) == ("sglang", 4, 18, 36)


def test_other_files_are_not_recognised(tmp_path: Path) -> None:
    save(tmp_path / "weights.pt", {"layers.0.weight": torch.ones(3)})
    assert not sglang.recognises(tmp_path / "weights.pt", (tmp_path / "weights.pt").read_bytes())
    assert not sglang.recognises(tmp_path, b"")
    save(tmp_path / "dump.pt", plain_dump())
    assert sglang.recognises(tmp_path, b"")


# -- placement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [0, 4])
def test_physical_ids_become_logical(replicas: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    map_BP = np.stack(
        [rng.permutation(np.concatenate([np.arange(E), np.arange(replicas)])) for _ in range(B)]
    )
    logical_BTK = drawn(5, B, 40, K, E, (0,))
    physical_BTK = np.full_like(logical_BTK, -1)
    for b, t, k in np.argwhere(logical_BTK >= 0).tolist():
        physical_BTK[b, t, k] = rng.choice(np.flatnonzero(map_BP[b] == logical_BTK[b, t, k]))
    path = save(tmp_path / "d.pt", dump([Ran(physical_BTK, EXTEND, [40])], map_BP))
    source = sglang.open_source(path, Given())
    (found,) = passes(source)
    assert choices_of(found) == {0: logical_BTK[1].tolist(), 1: logical_BTK[2].tolist()}
    assert "last map" in source.lacks["placement"]
    counts = save(
        tmp_path / "c.pt", dump([Ran(physical_BTK, EXTEND, [40])], map_BP, per_token=False)
    )
    (item,) = counted(sglang.open_source(counts, TOP_2))
    for layer, b in ((0, 1), (1, 2)):
        plain = Counter(logical_BTK[b].ravel().tolist())
        assert item.count_E[layer].tolist() == [plain[e] for e in range(E)]


def test_a_map_that_makes_an_expert_twice_has_changed(tmp_path: Path) -> None:
    map_BP = trivial(B, 12, E)
    physical_BTK = np.tile(np.array([0, 8]), (B, 3, 1))
    path = save(tmp_path / "d.pt", dump([Ran(physical_BTK, EXTEND, [3])], map_BP))
    with pytest.raises(
        ImportRefused, match=r"record 0, block 0, token 0.*\[0, 8\].*\[0, 0\].*last"
    ):
        passes(sglang.open_source(path, Given()))


# -- the circular buffer ---------------------------------------------------------------------------


def buffer(filled: list[int], size: int = 6) -> dict[str, Any]:
    """Row i has pass i's mark: that many tokens."""
    count_NBE = np.zeros((size, B, E), np.int32)
    for order, row in enumerate(filled, 1):
        count_NBE[row, 1:, :K] = order
    return made.stat(count_NBE)


@pytest.mark.parametrize(
    ("filled", "order", "why"),
    [
        ([0, 1, 2], [1, 2, 3], "as they lie"),
        ([2, 3, 4], [1, 2, 3], "empty part"),
        ([4, 5, 0, 1], [1, 2, 3, 4], "empty part"),
        ([3, 4, 5, 0, 1, 2], [4, 5, 6, 1, 2, 3], "is full"),
        ([4, 5, 1, 2], [3, 4, 1, 2], "several empty parts"),
    ],
)
def test_rows_of_the_buffer_are_ordered_as_far_as_they_can_be(
    filled: list[int], order: list[int], why: str, tmp_path: Path
) -> None:
    source = sglang.open_source(save(tmp_path / "s.pt", buffer(filled)), TOP_2)
    found = counted(source)
    assert [int(x.count_E[0][0]) for x in found] == order
    assert [x.step for x in found] == list(range(len(order)))
    assert why in source.lacks["steps"]


# -- ranks -----------------------------------------------------------------------------------------


def folder(tmp_path: Path, dumps: dict[str, dict[str, Any]]) -> Path:
    for name, data in dumps.items():
        save(tmp_path / f"expert_distribution_recorder_{name}.pt", data)
    return tmp_path


@pytest.mark.parametrize("per_token", [True, False])
def test_ranks_with_the_same_tokens_are_copies(per_token: bool, tmp_path: Path) -> None:
    dumps = {f"1_{r}": plain_dump(rank=r, per_token=per_token) for r in (0, 1)}
    dumps["1_2"] = plain_dump(seed=9, rank=2, per_token=per_token)
    for record in dumps["1_2"]["records"] if per_token else ():
        record["input_ids"] = [x + 1 for x in record["input_ids"]]
    source = sglang.open_source(folder(tmp_path, dumps), TOP_2)
    assert [(r.rank, r.copy) for r in source.ranks] == [(0, False), (1, True), (2, False)]


def test_ranks_with_the_same_words_elsewhere_are_no_copies(tmp_path: Path) -> None:
    other = plain_dump(5, rank=1)
    for record in other["records"]:
        record["positions"] = [x + 1 for x in record["positions"]]
    source = sglang.open_source(folder(tmp_path, {"1_0": plain_dump(), "1_1": other}), Given())
    assert [r.copy for r in source.ranks] == [False, False]


def test_copies_that_chose_otherwise_are_noted(tmp_path: Path) -> None:
    dumps = {"1_0": plain_dump(0, rank=0), "1_1": plain_dump(5, rank=1)}
    source = sglang.open_source(folder(tmp_path, dumps), Given())
    assert source.ranks[1].copy
    assert source.notes["passes in which rank 1 chose others than rank 0 for the same tokens"] == 2


def test_files_of_one_rank_that_say_the_same_are_read_once(tmp_path: Path) -> None:
    source = sglang.open_source(
        folder(tmp_path, {"1.1_0": plain_dump(), "1.2_0": plain_dump()}), Given()
    )
    assert [(r.rank, r.copy) for r in source.ranks] == [(0, False)]
    assert any("say the same" in note for note in source.notes)
    stats = tmp_path / "stat"
    stats.mkdir()
    folder(stats, {"1.1": buffer([0]), "1.2": buffer([0])})
    source = sglang.open_source(stats, TOP_2)
    assert len(source.ranks) == 1
    assert any("say the same" in note for note in source.notes)


def test_parts_of_the_experts_are_added_up(tmp_path: Path) -> None:
    whole = [Ran(drawn(s, B, 200, K, E), EXTEND, [200]) for s in (0, 1)]
    dumps = {}
    for rank in (0, 1):
        data = dump(whole, trivial(B, E), rank=rank, per_token=False)
        for record in data["records"]:
            # DeepEP's low-latency dispatch: what arrived at this rank's four experts.
            record["global_physical_count"][:, 4 * (1 - rank) : 4 * (2 - rank)] = 0
        dumps[f"1_{rank}"] = data
    source = sglang.open_source(folder(tmp_path, dumps), TOP_2)
    assert len(source.ranks) == 1
    for item, ran in zip(counted(source), whole, strict=True):
        for b in range(B):
            plain = Counter(ran.physical_BTK[b].ravel().tolist())
            assert item.count_E[b].tolist() == [plain[e] for e in range(E)]
    alone = tmp_path / "expert_distribution_recorder_1_0.pt"
    with pytest.raises(ImportRefused, match=r"its own experts.*folder"):
        sglang.open_source(alone, TOP_2)


def test_few_choices_in_one_part_are_chance(tmp_path: Path) -> None:
    """One token whose two experts are both of the first half: no rank counted its part alone."""
    one_token = np.tile(np.array([[0, 1]]), (B, 1, 1))
    data = dump([Ran(one_token, EXTEND, [1])], trivial(B, E), per_token=False)
    (item,) = counted(sglang.open_source(save(tmp_path / "d.pt", data), TOP_2))
    assert item.count_E[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_ranks_without_a_pass_in_common_are_no_copies(tmp_path: Path) -> None:
    dumps = {"1_0": plain_dump(first=0), "1_1": plain_dump(rank=1, first=2)}
    source = sglang.open_source(folder(tmp_path, dumps), Given(allow_gaps=True))
    assert [r.copy for r in source.ranks] == [False, False]


def other_tokens(data: dict[str, Any]) -> dict[str, Any]:
    for record in data["records"]:
        record["input_ids"] = [x + 1000 for x in record["input_ids"]]
    return data


def long_dump(seed: int, rank: int) -> dict[str, Any]:
    return dump([Ran(drawn(seed, B, 64, K, E), EXTEND, [64])], trivial(B, E), rank=rank)


def without(data: dict[str, Any], record: int) -> dict[str, Any]:
    del data["records"][record]
    return data


@pytest.mark.parametrize(
    ("dumps", "says"),
    [
        pytest.param(
            {"1_0": plain_dump(), "1_2": plain_dump(rank=2)},
            "no file of rank 1",
            id="a rank is missing",
        ),
        pytest.param(
            {"1_0": plain_dump(), "1_1": without(plain_dump(rank=1), 1)},
            "rank 1 has no pass 8",
            id="passes differ",
        ),
        pytest.param(
            {"1_0": plain_dump(), "2_0": plain_dump(first=50)},
            "both of rank 0 and hold other passes",
            id="two dumps",
        ),
        pytest.param(
            {"1.1_0": plain_dump(), "1.2_0": plain_dump(4)},
            "both of rank 0 and hold other choices",
            id="pipeline",
        ),
        pytest.param(
            {"1_0": plain_dump(), "1_1": dump(two_passes(), trivial(B, E)[:, ::-1].copy(), rank=1)},
            "other maps",
            id="maps differ",
        ),
        pytest.param(
            {"1_0": plain_dump(), "1_1": plain_dump(rank=1, per_token=False)},
            "other modes",
            id="modes differ",
        ),
        pytest.param(
            {"1_0": plain_dump(), "1": buffer([0])},
            "other modes",
            id="stat among them",
        ),
        pytest.param({"1": buffer([0]), "2": buffer([0, 1])}, "two dumps", id="two stat dumps"),
        pytest.param(
            {"1_0": long_dump(0, 0), "1_1": other_tokens(long_dump(0, 1))},
            "rank 1 has the choices of rank 0 for other tokens",
            id="rows of the first rank",
        ),
    ],
)
def test_files_that_do_not_go_together_are_refused(
    dumps: dict[str, dict[str, Any]], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ImportRefused, match=says) as e:
        sglang.open_source(folder(tmp_path, dumps), TOP_2)
    assert "\n" not in str(e.value)
    assert str(tmp_path) in str(e.value)


def test_missing_passes_may_be_allowed(tmp_path: Path) -> None:
    three = [*two_passes(), Ran(drawn(8, B, 1, K, E, (0,)), DECODE, None, [8])]
    holed = without(dump(three, trivial(B, E)), 1)
    path = save(tmp_path / "d.pt", holed)
    with pytest.raises(ImportRefused, match=r"record 1: pass 9 after pass 7: 1 passes are missing"):
        sglang.open_source(path, Given())
    source = sglang.open_source(path, Given(allow_gaps=True))
    assert [x.step for x in passes(source)] == [7, 9]
    assert source.notes["passes that are missing in the recording"] == 1


# -- what the user says is checked -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "given", "says"),
    [
        ("per_token", Given(experts=16), "of 8 experts, but 16 were given"),
        ("per_token", Given(top_k=4), "of top-2, but top-4 was given"),
        ("per_token", Given(blocks=4), "of 3 decoder blocks, but 4 were given"),
        ("per_token", Given(dense_blocks=()), "block 0 has no choice in any pass"),
        ("per_token", Given(dense_blocks=(0, 1)), "block 1 is given as dense"),
        ("stat", Given(), "give --top-k"),
        ("per_pass", Given(), "give --top-k"),
    ],
)
def test_what_the_file_contradicts_is_refused(mode: str, given: Given, says: str) -> None:
    with pytest.raises(ImportRefused, match=says):
        sglang.open_source(DATA / f"{mode}.pt", given)


def test_what_the_file_does_not_know_is_taken() -> None:
    given = Given(dense_blocks=(0,), hidden_size=64, intermediate_size=32)
    source = sglang.open_source(DATA / "per_token.pt", given)
    assert not source.notes
    assert {(x.hidden_size, x.intermediate_size) for x in source.layers} == {(64, 32)}


def test_forward_modes_without_pieces_have_no_tokens(tmp_path: Path) -> None:
    ran = [
        Ran(drawn(0, B, 4, K, E), made.TARGET_VERIFY, None, [5, 6, 6, 7]),
        Ran(drawn(0, B, 0, K, E), IDLE),
        Ran(drawn(1, B, 3, K, E), MIXED, [2, 1], [0, 1, 9]),
    ]
    found = passes(sglang.open_source(save(tmp_path / "d.pt", dump(ran, trivial(B, E))), Given()))
    assert [(x.phase, x.tokens is None) for x in found] == [("decode", True), ("unknown", False)]


def test_a_number_that_no_rank_has_is_refused(tmp_path: Path) -> None:
    """All numbers below it are not written down to find the first that is missing."""
    dumps = {"1_0": plain_dump(), "1_1": plain_dump(rank=1 << 40)}
    with pytest.raises(ImportRefused, match="there is no file of rank 1, but one of rank 1099511"):
        sglang.open_source(folder(tmp_path, dumps), Given())

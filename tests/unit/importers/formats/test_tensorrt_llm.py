"""TensorRT-LLM's counts: what its own code wrote, and what nobody should believe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.engines.tensorrt_llm import (
    BLOCKS,
    EXPERTS,
    RANKS,
    STEPS,
    TOP_K,
    Counts,
    counted,
    drawn,
    write_counts,
)

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats import tensorrt_llm
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Counted, Given, Source

PEERS = Path(__file__).parents[3] / "data/engines/tensorrt_llm"
"""Written by TensorRT-LLM's own expert_statistic.py: see tests/support/engines/tensorrt_llm.py."""


def items(source: Source, rank: int = 0) -> list[Counted]:
    out = list(source.ranks[rank].items())
    assert all(isinstance(x, Counted) for x in out)
    return out  # type: ignore[return-value]


def test_the_engines_own_files() -> None:
    source = tensorrt_llm.open_source(PEERS, Given())
    assert [(x.block, x.experts, x.top_k) for x in source.layers] == [
        (block, EXPERTS, TOP_K) for block in BLOCKS
    ]
    assert [(x.rank, x.copy) for x in source.ranks] == [(0, False), (1, False)]
    assert not source.notes
    for rank in range(RANKS):
        got = items(source, rank)
        assert [(x.step, x.forward) for x in got] == [(step, 0) for step in STEPS]
        for x in got:
            for layer, block in enumerate(BLOCKS):
                looped = [0] * EXPERTS
                for token in drawn(rank, x.step, block).tolist():
                    for expert in token:
                        looped[expert] += 1
                assert x.count_E[layer].tolist() == looped


def test_the_builder_writes_what_the_engine_wrote(tmp_path: Path) -> None:
    write_counts(tmp_path, {rank: counted(rank) for rank in range(RANKS)})
    for file in sorted(PEERS.iterdir()):
        if file.suffix == ".json":
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()
            continue
        ours, theirs = load_file(tmp_path / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        for key, count_E in theirs.items():
            assert (ours[key].dtype, ours[key].shape) == (count_E.dtype, count_E.shape)
            np.testing.assert_array_equal(ours[key], count_E)


def test_a_trace_has_the_tokens_that_were_counted(tmp_path: Path) -> None:
    done = import_trace(PEERS, tmp_path / "run", format="tensorrt-llm")
    tokens = sum(len(drawn(rank, step, 3)) for rank in range(RANKS) for step in STEPS)
    assert (done.passes, done.tokens) == (RANKS * len(STEPS), tokens)
    assert done.token_layers == tokens * len(BLOCKS)


# -- variants that are right -----------------------------------------------------------------------


def test_it_is_recognised(tmp_path: Path) -> None:
    assert tensorrt_llm.recognises(PEERS, b"")
    assert tensorrt_llm.recognises(PEERS / "rank1.safetensors", b"\x40")
    assert not tensorrt_llm.recognises(tmp_path, b"")
    assert not tensorrt_llm.recognises(tmp_path / "model.safetensors", b"")


def test_counts_of_32_bits(tmp_path: Path) -> None:
    write_counts(tmp_path, {0: counted(0, dtype=np.int32)})
    got = items(tensorrt_llm.open_source(tmp_path, Given()))
    assert got[0].count_E[0].sum() == len(drawn(0, STEPS[0], BLOCKS[0])) * TOP_K


def test_other_files_of_a_branch_are_left_alone(tmp_path: Path) -> None:
    write_counts(tmp_path, {0: counted(0)})
    for name in ("rank0_raw", "token_selected_experts_rank0", "cooccurrence_rank0"):
        save_file({"100_3": drawn(0, 100, 3)}, tmp_path / f"{name}.safetensors")
    assert len(tensorrt_llm.open_source(tmp_path, Given()).ranks) == 1


def test_ranks_that_counted_the_same_are_copies(tmp_path: Path) -> None:
    write_counts(tmp_path, {0: counted(0), 1: counted(0), 2: counted(2)})
    source = tensorrt_llm.open_source(tmp_path, Given())
    assert [x.copy for x in source.ranks] == [False, True, False]
    assert list(source.notes.values()) == [1]


def test_pipeline_stages_have_layers_of_their_own(tmp_path: Path) -> None:
    of = {0: (3, 4), 1: (3, 4), 2: (10,), 3: (10,)}
    write_counts(tmp_path, {rank: counted(rank, blocks=blocks) for rank, blocks in of.items()})
    source = tensorrt_llm.open_source(tmp_path, Given(blocks=10))
    assert [(x.block, x.role) for x in source.layers] == [(3, "mlp"), (4, "mlp"), (10, "mtp")]
    assert sorted(items(source, 0)[0].count_E) == [0, 1]
    assert sorted(items(source, 3)[0].count_E) == [2]


def test_without_meta_the_user_says(tmp_path: Path) -> None:
    write_counts(tmp_path, {0: counted(0)})
    (tmp_path / "meta_info.json").unlink()
    with pytest.raises(
        ImportRefused, match=r"meta_info.json cannot be read .*--experts and --top-k"
    ):
        tensorrt_llm.open_source(tmp_path, Given(experts=EXPERTS))
    source = tensorrt_llm.open_source(tmp_path, Given(experts=EXPERTS, top_k=TOP_K))
    assert (source.layers[0].experts, source.layers[0].top_k) == (EXPERTS, TOP_K)


@pytest.mark.parametrize(
    ("steps", "notes"), [(((100, 103), (100, 103)), [4]), (((100, 101), (100,)), [1])]
)
def test_gaps_can_be_taken(steps: Any, notes: list[int], tmp_path: Path) -> None:
    write_counts(tmp_path, {rank: counted(rank, steps=x) for rank, x in enumerate(steps)})
    with pytest.raises(ImportRefused, match="--allow-gaps"):
        tensorrt_llm.open_source(tmp_path, Given())
    source = tensorrt_llm.open_source(tmp_path, Given(allow_gaps=True))
    assert [[x.step for x in items(source, rank)] for rank in (0, 1)] == [list(x) for x in steps]
    assert list(source.notes.values()) == notes


# -- files that are damaged ------------------------------------------------------------------------


def _counts(rank: int, change: Callable[[Counts], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / f"rank{rank}.safetensors"
        counts = {key: count_E.copy() for key, count_E in load_file(path).items()}
        change(counts)
        save_file(counts, path)

    return damage


def _meta(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "meta_info.json").write_text(text)


def _said(**values: object) -> Callable[[Path], object]:
    return _meta(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K} | values))


def _torn(folder: Path) -> None:
    path = folder / "rank1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _bfloat16(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_tensors

    save_tensors({"100_3": torch.ones(6, dtype=torch.bfloat16)}, folder / "rank0.safetensors")


def _without(*keys: str) -> Callable[[Counts], object]:
    return lambda counts: [counts.pop(key) for key in keys]


def _with(key: str, value: Any) -> Callable[[Counts], object]:
    return lambda counts: counts.update({key: value})


def _add(key: str, expert: int, n: int) -> Callable[[Counts], object]:
    return lambda counts: counts[key].__setitem__(expert, counts[key][expert] + n)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (_torn, r"rank1.safetensors is no whole safetensors file \("),
    "no safetensors": (
        lambda folder: (folder / "rank0.safetensors").write_bytes(b"PK\3\4" * 99),
        "rank0.safetensors is no whole safetensors file",
    ),
    "nothing recorded": (_counts(1, dict.clear), "rank1.safetensors holds no counts"),
    "null for meta": (_meta("null"), "meta_info.json is null: rank 0 recorded nothing"),
    "torn meta": (_meta('{"num_exp'), "meta_info.json is no JSON"),
    "meta of another kind": (_meta("[1]"), "meta_info.json is no object, but a list"),
    "no top-k": (_said(num_experts_per_token=None), "num_experts_per_token is None, .*--top-k"),
    "another top-k": (
        _said(num_experts_per_token=3),
        "layer 0: 10 choices are no multiple of top-3",
    ),
    "more experts": (_said(num_experts=8), r"key '100_3' is int64 of \[6\], .* of 8 experts"),
    "a missing layer": (_counts(1, _without("101_4")), "rank1.* iteration 101 has no layer 4"),
    "a missing iteration": (
        _counts(0, _without(*(f"101_{block}" for block in BLOCKS))),
        "rank0.*: iteration 101 is missing between 100 and 102",
    ),
    "ranks of other iterations": (
        _counts(1, _without(*(f"102_{block}" for block in BLOCKS))),
        "rank1.* has iterations 100 to 101, but rank 0 100 to 102",
    ),
    "ranks of other layers": (
        _counts(1, _without(*(f"{step}_5" for step in STEPS))),
        "rank1.*: layer 5 is in only one of ranks 0 and 1, which share layer 3",
    ),
    "a missing rank": (
        lambda folder: (folder / "rank0.safetensors").unlink(),
        "rank0.safetensors is missing: .*--allow-gaps",
    ),
    "a rank far away": (
        lambda folder: shutil.copy(
            folder / "rank1.safetensors", folder / "rank99999999999.safetensors"
        ),
        "rank2.safetensors is missing: .*--allow-gaps",
    ),
    "an iteration far away": (
        _counts(0, lambda x: x.update({f"99999999999_{b}": np.ones(6, int) for b in BLOCKS})),
        "rank0.*: iteration 103 is missing between 100 and 99999999999",
    ),
    "a key of many digits": (
        _counts(0, _with("100_" + "9" * 5000, np.ones(6, int))),
        "key '100_9+' is no iteration_layer",
    ),
    "numbers that numpy has not": (_bfloat16, "key '100_3' holds no integers"),
    "deep meta": (_meta("[" * 100_000), "meta_info.json is no JSON"),
    "a strange key": (_counts(0, _with("100_None", np.ones(6, int))), "key '100_None' is no iter"),
    "floats": (_counts(0, _with("100_3", np.ones(6))), r"key '100_3' is float64 of \[6\]"),
    "a longer count": (_counts(0, _with("101_3", np.ones(7, int))), r"'101_3' is int64 of \[7\]"),
    "a choice too many": (_counts(0, _add("101_4", 2, 1)), "iteration 101, layer 1: 13 choices"),
    "below zero": (_counts(0, _add("100_3", 0, -99)), r"iteration 100, layer 0: expert 0 has -9\d"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_with_the_place(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    folder = tmp_path / "counts"
    shutil.copytree(PEERS, folder)
    damage(folder)
    with pytest.raises(ImportRefused, match=message) as e:
        import_trace(folder, tmp_path / "run", format="tensorrt-llm")
    assert "\n" not in str(e.value)
    assert str(folder) in str(e.value)
    assert not (tmp_path / "run").exists()


def test_a_stage_that_lost_a_rank_is_refused(tmp_path: Path) -> None:
    of = {0: (3, 4), 1: (3, 4), 2: (5,)}
    write_counts(tmp_path, {rank: counted(rank, blocks=blocks) for rank, blocks in of.items()})
    with pytest.raises(ImportRefused, match="layer 5 has 1 ranks, other layers have more"):
        tensorrt_llm.open_source(tmp_path, Given())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Given(experts=4), "num_experts is 6, but --experts says 4: a load balancer's slots"),
        (Given(experts=9), r"num_experts is 6, but --experts says 9\.$"),
        (Given(top_k=1), r"num_experts_per_token is 2, but --top-k says 1\.$"),
    ],
)
def test_facts_that_contradict(given: Given, message: str) -> None:
    with pytest.raises(ImportRefused, match=message):
        tensorrt_llm.open_source(PEERS, given)


def test_one_file_of_many(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="name the folder"):
        tensorrt_llm.open_source(PEERS / "rank0.safetensors", Given())

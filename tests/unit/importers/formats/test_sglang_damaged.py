"""SGLang's recorder: damaged dumps, each refused with one line that names the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from support.engines import sglang as made
from support.engines.sglang import DECODE, EXTEND, Ran, drawn, dump, save, trivial

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats import sglang
from moe_lens.importers.source import Given

DATA = Path(__file__).parents[3] / "data/engines/sglang"
B, K, E = 3, 2, 8
TOP_2 = Given(top_k=K)


def plain_dump(**more: Any) -> dict[str, Any]:
    """Two passes; block 0 is dense."""
    ran = [
        Ran(drawn(0, B, 6, K, E, (0,)), EXTEND, [4, 2], [0, 1, 2, 3, 5, 6]),
        Ran(drawn(1, B, 2, K, E, (0,)), DECODE, None, [4, 7]),
    ]
    return dump(ran, trivial(B, E), **more)


Damage = Callable[[dict[str, Any]], Any]


def put(key: str, value: Any, record: int = 1) -> Damage:
    def damage(data: dict[str, Any]) -> None:
        data["records"][record][key] = value

    return damage


def at(key: str, index: tuple[int, ...], value: int, record: int = 1) -> Damage:
    def damage(data: dict[str, Any]) -> None:
        data["records"][record][key][index] = value

    return damage


def drop(key: str) -> Damage:
    return lambda data: data["records"][1].pop(key)


def cut(data: dict[str, Any]) -> None:
    record = data["records"][1]
    record["topk_ids_of_layer"] = record["topk_ids_of_layer"][:, :-1].clone()


def lost_choice(data: dict[str, Any]) -> None:
    """A token of block 1 is not routed, and the record counts so."""
    record = data["records"][1]
    ids = record["topk_ids_of_layer"][1, 1]
    for e in ids[:K].tolist():
        record["global_physical_count"][1, e] -= 1
    ids[:] = -1


def moved_choice(data: dict[str, Any]) -> None:
    """One token of block 1 has a choice less and the next one more: the counts stay."""
    ids = data["records"][1]["topk_ids_of_layer"][1]
    ids[1, K] = ids[0, 1]
    ids[0, 1] = -1


def map_at(index: Any, value: int) -> Damage:
    def damage(data: dict[str, Any]) -> None:
        data["last_physical_to_logical_map"][index] = value

    return damage


def shifted(data: dict[str, Any]) -> None:
    """One id is another; the count is not."""
    ids = data["records"][1]["topk_ids_of_layer"]
    ids[2, 0, 0] = next(e for e in range(E) if e not in ids[2, 0].tolist())


NOWHERE = torch.zeros(B, 2, 8, dtype=torch.int32, device="meta")
SPARSE = torch.zeros(B, 2, 8, dtype=torch.int32).to_sparse()
STRIDELESS = torch.zeros(1, dtype=torch.int32).expand(B, 1_000_000, 8)
"""Of any size, in a file of a few bytes."""


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop("positions"), r"record 1 has no 'positions'"),
        (drop("topk_ids_of_layer"), r"record 1 has no 'topk_ids_of_layer'"),
        (cut, r"record 1: 2 input_ids, but 1 rows"),
        (at("topk_ids_of_layer", (1, 0, 0), 99), r"record 1, block 1, token 0: physical expert 99"),
        (at("topk_ids_of_layer", (1, 0, 0), -7), r"record 1, block 1, token 0: physical expert -7"),
        (shifted, r"record 1, block 2: .* global_physical_count is"),
        (moved_choice, r"record 1, block 1, token 0: fewer than 2 choices"),
        (lost_choice, r"record 1, block 1: 2 choices of 2 tokens, not 2 each"),
        (put("topk_ids_of_layer", torch.zeros(B, 2, 8)), r"record 1: topk_ids.* float32"),
        (put("topk_ids_of_layer", torch.zeros(B, 2, 6).int()), r"record 1: .*\[3, 2, 6\]"),
        (put("topk_ids_of_layer", [1]), r"record 1: topk_ids_of_layer is a list"),
        (put("global_physical_count", torch.zeros(B, 4).int()), r"record 1: .*\[3, 4\].*\[3, 8\]"),
        (at("global_physical_count", (1, 0), -1), r"record 1, block 1: a count is -1"),
        (put("forward_pass_id", 7), r"record 1: pass 7 after pass 7: passes of a draft model"),
        (put("forward_pass_id", "8"), r"record 1: forward_pass_id is '8'"),
        (put("forward_mode", 12), r"record 1: forward_mode is 12"),
        (put("rank", 3), r"record 1 is of rank 3"),
        (put("gatherer_key", "master"), r"record 1: gatherer_key is 'master'"),
        (put("extend_seq_lens", [4, 1], 0), r"record 0: extend_seq_lens add up to 5"),
        (put("positions", [0, 1, 2, 9, 5, 6], 0), r"record 0, token 3: position 9 after 2"),
        (put("positions", [0, -1]), r"record 1, token 1: positions has -1"),
        (put("input_ids", [0.5, 1]), r"record 1: input_ids is no list"),
        (put("input_ids", [1 << 70, 1]), r"record 1: input_ids has a number that no integer"),
        (map_at((1, 3), 4), r"map, block 1: no place for expert 3"),
        (map_at((1, 3), -1), r"map, block 1: expert -1"),
        (map_at((1, 3), 1 << 40), r"map, block 0: no place for expert 8 of 1099511627777 logical"),
        (put("topk_ids_of_layer", NOWHERE), r"record 1: topk_ids.* not hold all of \[3, 2, 8\]"),
        (put("topk_ids_of_layer", SPARSE), r"record 1: topk_ids.* not hold all of \[3, 2, 8\]"),
        (put("topk_ids_of_layer", STRIDELESS), r"topk_ids.* not hold all of \[3, 1000000, 8\]"),
        (put("forward_pass_id", torch.zeros(2, 9)), r"record 1: forward_pass_id is tensor\(\[\["),
        (put("rank", torch.zeros(9)), r"record 1: the rank is tensor"),
        (
            lambda d: d.pop("last_physical_to_logical_map"),
            r"last_physical_to_logical_map is missing",
        ),
        (lambda d: d["records"].clear(), r"has no record"),
        (lambda d: d.update(records=3), r"'records' is a int"),
        (lambda d: d["records"].insert(1, 5), r"record 1 is a int"),
        (lambda d: d.pop("records"), r"neither 'logical_count' nor 'records'"),
    ],
)
def test_damaged_records_are_refused(damage: Damage, says: str, tmp_path: Path) -> None:
    data = plain_dump()
    damage(data)
    path = save(tmp_path / "d.pt", data)
    with pytest.raises(ImportRefused, match=says) as e:
        list(sglang.open_source(path, Given()).ranks[0].items())
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_pass_of_counts_among_tokens_is_refused(tmp_path: Path) -> None:
    data = plain_dump(per_token=False)
    data["records"][1] = plain_dump()["records"][1]
    with pytest.raises(ImportRefused, match="record 1 is of mode per_token"):
        sglang.open_source(save(tmp_path / "d.pt", data), TOP_2)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (made.stat(np.zeros((2, B, E))), "all counts are zero"),
        (made.stat(np.full((2, B, E), -1)), "row 0, block 0, expert 0: a count is -1"),
        (made.stat(np.ones((B, E))), "logical_count is int32 of shape"),
        (made.stat(np.ones((0, B, E))), "is empty"),
        (made.stat(np.ones((1, B, E))) | {"rank": 2}, "the rank is 2"),
        (made.stat(np.ones((1, B, E))) | {"rank": torch.ones(2)}, "the rank is tensor"),
        (made.stat(np.ones((1, B, E))) | {"logical_count": [1]}, "is a list, not a tensor"),
        ({"a": 1}, "neither 'logical_count' nor 'records'"),
        ([1, 2], "holds a list"),
    ],
)
def test_damaged_counts_are_refused(data: Any, says: str, tmp_path: Path) -> None:
    path = save(tmp_path / "s.pt", data)
    with pytest.raises(ImportRefused, match=says) as e:
        sglang.open_source(path, TOP_2)
    assert str(path) in str(e.value)


class Thing:
    """What `weights_only` does not load."""


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = (DATA / "per_token.pt").read_bytes()
    for n in (0, 100, len(whole) // 2, len(whole) - 10):
        path = tmp_path / f"{n}.pt"
        path.write_bytes(whole[:n])
        with pytest.raises(ImportRefused, match="torn") as e:
            sglang.open_source(path, Given())
        assert "\n" not in str(e.value)
    path = tmp_path / "zipped.pt"
    with ZipFile(DATA / "stat.pt") as old, ZipFile(path, "w", ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ImportRefused, match=r"is compressed, which torch\.save"):
        sglang.open_source(path, TOP_2)
    path = save(tmp_path / "thing.pt", plain_dump() | {"more": Thing()})
    with pytest.raises(ImportRefused, match="more than tensors and plain values"):
        sglang.open_source(path, Given())
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ImportRefused, match=r"no \.pt file"):
        sglang.open_source(empty, Given())

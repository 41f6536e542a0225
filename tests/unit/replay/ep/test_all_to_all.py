"""The modelled all-to-all, in closed form, and where its numbers come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens.errors import ReplayError
from moe_lens.replay.ep.all_to_all import KIND, PRESETS, Link, busiest, fit_path, link_of, read_link
from moe_lens.replay.ep.settings import Parallel, row_bytes

LINK = Link("l", "test", 1e-3, 100.0, 10.0, "made up")
FIT: dict[str, Any] = {
    "kind": KIND, "backend": "nccl", "latency_s": 1e-5, "bytes_per_s": 3e11, "note": "measured",
}  # fmt: skip


def test_the_busiest_rank_decides_whether_it_sends_or_receives() -> None:
    bytes_RR = np.array([[900, 10, 20], [5, 900, 0], [7, 0, 900]])
    assert busiest(bytes_RR) == 30  # what the first sends
    assert busiest(bytes_RR.T) == 30
    assert LINK.seconds(bytes_RR) == pytest.approx(1e-3 + 30 / 100)


def test_what_stays_at_home_costs_nothing() -> None:
    assert LINK.seconds(np.diag([5, 6, 7])) == 0
    assert LINK.seconds(np.array([[5]])) == 0


def test_a_network_is_shared_by_the_ranks_of_a_node() -> None:
    bytes_RR = np.zeros((4, 4), np.int64)
    bytes_RR[0, 1], bytes_RR[0, 2], bytes_RR[1, 3] = 100, 30, 50
    within = np.zeros((2, 2), np.int64)
    # Rank 0 sends 130 bytes at 100 a second; without a network that is all.
    assert LINK.seconds(bytes_RR, within) == pytest.approx(1e-3 + 1.3)
    between = np.array([[100, 80], [0, 0]])
    # Node 0 sends 80 bytes over two cards of 10 a second.
    assert LINK.seconds(bytes_RR, between) == pytest.approx(1e-3 + 4.0)


def test_presets_are_of_the_literature_and_ordered() -> None:
    assert {link.label for link in PRESETS.values()} == {"literature"}
    assert all("DeepEP" in link.source for link in PRESETS.values())
    low = PRESETS["h800-low-latency"]
    # Its line goes through both rows it was taken from: 128 tokens of 7,168, top-8.
    for dtype, us in (("fp8", 77), (None, 114)):
        size = 128 * 8 * row_bytes(7168, dtype, torch.bfloat16)
        taken = low.latency_s + size / low.bytes_per_s
        assert 1e6 * taken == pytest.approx(us, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "width", "wanted"),
    [
        (None, 7168, 14336),
        ("fp8", 7168, 7168 + 56 * 4),
        ("fp8", 100, 104),
        ("float32", 7168, 4 * 7168),
        ("bfloat16", 3, 6),
    ],
)
def test_bytes_of_a_row(dtype: str | None, width: int, wanted: int) -> None:
    assert row_bytes(width, dtype, torch.bfloat16) == wanted


def test_a_fit_of_this_machine_comes_before_the_literature(cache: Path) -> None:
    def link(asked: str | None = None, nodes: int = 1) -> Link:
        return link_of(asked, device_name="A GPU", ranks=8, nodes=nodes)

    assert link() == PRESETS["h800"]
    path = fit_path("A GPU", 8, "nccl")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(FIT))
    assert path.is_relative_to(cache)
    assert (link().label, link().bytes_per_s) == ("nccl", 3e11)
    assert link(nodes=2) == PRESETS["h800"]  # the fit knows no network
    assert link("B200") == PRESETS["b200"]
    assert link(str(path)).latency_s == 1e-5
    with pytest.raises(ReplayError, match="is of one node"):
        link(str(path), nodes=2)
    assert link_of(None, device_name="A GPU", ranks=4, nodes=1) == PRESETS["h800"]


def test_what_is_no_fit(tmp_path: Path) -> None:
    with pytest.raises(
        ReplayError, match="no all-to-all is called 'infiniband': it is one of h800"
    ):
        link_of("infiniband", device_name="", ranks=2, nodes=1)
    with pytest.raises(ReplayError, match="cannot be read"):
        link_of("nowhere.json", device_name="", ranks=2, nodes=1)
    path = tmp_path / "x.json"
    for text in ("[]", "{}", json.dumps({**FIT, "kind": "x"}), json.dumps({**FIT, "note": 1})[:-9]):
        path.write_text(text)
        with pytest.raises(ReplayError, match="is not a fit that"):
            read_link(path)
    path.write_text(json.dumps({**FIT, "bytes_per_s": 0}))
    with pytest.raises(ReplayError, match="a bandwidth of 0"):
        read_link(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"ranks": 0}, "ranks is 1 or more, got 0"),
        ({"nodes": 0}, "nodes is 1 or more"),
        ({"replicas": -1}, "replicas is 0 or more"),
        ({"timeout_s": 0}, "the timeout is above 0"),
        ({"dispatch_dtype": "fp4"}, "dispatch dtype is 'fp4': it is one of fp8"),
    ],
)
def test_what_is_no_group(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ReplayError, match=said):
        Parallel(**{"ranks": 2, **words})

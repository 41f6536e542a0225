"""A live trace of what vLLM itself answers, against what its routers chose; in vLLM's environment.

`support/engines/vllm_live.py` says how far vLLM goes on a CPU, and where the truth comes from.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_lens
from moe_lens.importers.formats import vllm
from moe_lens.importers.importing import import_trace
from moe_lens.importers.source import Given

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SCRIPT = ROOT / "tests" / "support" / "engines" / "vllm_live.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (PYTHON.parents[1] / ".installed").exists(),
        reason="vLLM's CPU build (3.4 GB, not in CI) is not installed: `make vllm`",
    ),
]

Choice = tuple[str, int, int]
"""Request, position, layer."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script left, and what it said."""
    folder = tmp_path_factory.mktemp("vllm")
    paths = [folder / "run", folder / "truth.npz", folder / "responses.jsonl"]
    done = subprocess.run(
        [PYTHON, SCRIPT, *paths],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said | dict(zip(("run", "truth", "responses"), paths, strict=True))


def truth(served: dict[str, Any]) -> dict[Choice, tuple[int, ...]]:
    """What the gates chose; the block before the first layer has no experts."""
    with np.load(served["truth"]) as found:
        return {
            (str(request), int(position), int(block) - 1): tuple(map(int, ids))
            for request, (position, block, *ids) in zip(
                found["requests"], found["numbers"], strict=True
            )
        }


SQL = """
    select s.request, t.position, r.layer, r.expert_ids, t.token_id, t.tag
    from routing r join tokens t using (step, forward, token) join sequences s using (sequence)
"""


def rows_of(run: Path) -> list[dict[str, Any]]:
    with moe_lens.open(run) as trace:
        found: list[dict[str, Any]] = trace.sql(SQL).arrow().to_pylist()
    return found


def test_trace_is_what_ran_token_by_token(served: dict[str, Any]) -> None:
    want = truth(served)
    requests = {request for request, _, _ in want}
    rows = rows_of(served["run"])
    got = {
        (r["request"], r["position"], r["layer"]): tuple(sorted(r["expert_ids"]))
        for r in rows
        if r["request"] in requests
    }
    assert len(want) > 3000
    assert got == want  # not one token more: those out of the prefix cache ran for nobody


def test_prefix_cache_was_met(served: dict[str, Any]) -> None:
    with moe_lens.open(served["run"]) as trace:
        starts = trace.sql(
            "select tag, min(position) as first from tokens group by tag, sequence order by all"
        ).df()
    assert set(starts[starts.tag == "offline"]["first"]) == {0}
    cached = starts[starts.tag == "second turn"]["first"]
    assert cached.max() >= 96  # of blocks of 32 tokens
    assert (cached % 32 == 0).all()


def test_token_ids_stand_at_their_positions(served: dict[str, Any]) -> None:
    with np.load(served["truth"]) as found:
        tokens = dict(zip(found["names"], map(json.loads, found["tokens"]), strict=True))
    rows = rows_of(served["run"])
    rows = [r for r in rows if r["request"] in tokens and r["token_id"] is not None]
    assert {r["tag"] for r in rows} == {"offline", "second turn", "server"}
    for r in rows:
        assert r["token_id"] == tokens[r["request"]][r["position"]]


def test_nothing_was_refused(served: dict[str, Any]) -> None:
    assert served["refused"] == 0
    assert served["sequences"] == 24
    assert served["several"] == [2, 2]


def test_rows_are_one_less_than_tokens_and_begin_where_asked(served: dict[str, Any]) -> None:
    assert served["rows"] == [20 + 4 - 1, 20 + 4 - 1, 20 + 4 - 1 - 11, 5]


def test_responses_in_a_file_are_the_same_trace(served: dict[str, Any], tmp_path: Path) -> None:
    path = served["responses"]
    assert vllm.recognises(path, path.read_bytes()[:4096])
    run = tmp_path / "run"
    import_trace(path, run, given=Given(experts=16, dense_blocks=(0,)))
    want = truth(served)
    requests = {request for request, _, _ in want}
    rows = [r for r in rows_of(run) if r["request"] in requests]
    assert len({r["request"] for r in rows}) == 4
    for r in rows:
        assert tuple(sorted(r["expert_ids"])) == want[r["request"], r["position"], r["layer"]]

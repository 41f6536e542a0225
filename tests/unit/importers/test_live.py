"""Live traces: many threads, `kill -9`, reading while open, and what is refused on the way."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.engines.vllm_answers import (
    CompletionOutput,
    RequestOutput,
    Served,
    choices,
    numpy2base64,
    output_of,
)

import moe_lens
from moe_lens.errors import ImportRefused, TraceLocked, TraceWriteError
from moe_lens.importers import live as module
from moe_lens.importers.batching import Batching

SHAPE: dict[str, Any] = {"experts": 16, "top_k": 2, "blocks": 4, "dense_blocks": [0]}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[moe_lens.LiveTrace]:
    made = moe_lens.LiveTrace(tmp_path / "run", **SHAPE)
    yield made
    made.close()


def rows(run: Path, sql: str) -> list[dict[str, Any]]:
    with moe_lens.open(run) as trace:
        found: list[dict[str, Any]] = trace.sql(sql).arrow().to_pylist()
    return found


BY_TOKEN = """
    select s.request, t.position, r.layer, r.expert_ids, t.token_id, t.tag
    from routing r join tokens t using (step, forward, token) join sequences s using (sequence)
"""


def in_trace(run: Path) -> dict[tuple[str, int, int], list[int]]:
    """Choices by request, position and layer."""
    return {(r["request"], r["position"], r["layer"]): r["expert_ids"] for r in rows(run, BY_TOKEN)}


def expected(name: str, ids_TBK: np.ndarray, first: int = 0) -> dict[Any, list[int]]:
    return {
        (name, first + t, block - 1): row[block]
        for t, row in enumerate(ids_TBK.tolist())
        for block in (1, 2, 3)
    }


ONE = Served([5, 6, 7], [[8, 9]], name="cmpl-1")


# -- what is taken ---------------------------------------------------------------------------------


class Dumped(SimpleNamespace):
    """An object of the openai package: extra fields are in what it dumps."""

    def model_dump(self) -> dict[str, Any]:
        return dict(vars(self))


@pytest.mark.parametrize(
    "output",
    [output_of(ONE), ONE.completion(), ONE.chat(), ONE.generate(), Dumped(**ONE.chat())],
    ids=["RequestOutput", "completion", "chat", "generate", "openai object"],
)
def test_every_kind_of_answer(live: moe_lens.LiveTrace, output: Any) -> None:
    assert live.add(output, tag="chat") == 1
    live.flush()
    assert in_trace(live.run) == expected("cmpl-1", ONE.ids[0])
    assert rows(live.run, "select tag, request from sequences") == [
        {"tag": "chat", "request": "cmpl-1"}
    ]
    steps = rows(live.run, "select phase, tokens from steps order by step")
    assert steps == [{"phase": "prefill", "tokens": 3}, {"phase": "decode", "tokens": 1}]


def test_an_answer_of_sglang(live: moe_lens.LiveTrace) -> None:
    """`/generate` and the OpenAI API with return_meta_info: int32, one id after another."""
    ids = choices(4).astype("<i4")
    meta = {
        "id": "sg",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "finish_reason": {"type": "length"},
        "routed_experts": base64.b64encode(ids.tobytes()).decode(),
    }
    live.add({"text": "…", "meta_info": meta}, tag="a")
    live.add({"choices": [{"index": 0, "meta_info": meta}]}, request="second")
    live.add({"text": "…", "meta_info": meta | {"id": "st", "prompt_tokens": 5}}, prompt_start=2)
    with pytest.raises(ImportRefused, match="4 rows, but 3 tokens ran"):
        live.add({"text": "…", "meta_info": meta | {"completion_tokens": 1}})
    live.flush()
    want = expected("sg", ids) | expected("second", ids) | expected("st", ids, first=2)
    assert in_trace(live.run) == want


def test_one_completion_output_and_a_plain_array(live: moe_lens.LiveTrace) -> None:
    ids = choices(6)
    live.add(CompletionOutput(0, [1, 2], ids), request="a")
    live.add_routing(ids.tolist(), request="b", tag="x", prompt_tokens=4, first_position=10)
    live.flush()
    assert in_trace(live.run) == expected("a", ids) | expected("b", ids, first=10)
    phases = rows(live.run, "select phase, sum(tokens)::int n from steps group by 1 order by 1")
    assert phases == [
        {"phase": "decode", "n": 2},
        {"phase": "prefill", "n": 4},
        {"phase": "unknown", "n": 6},
    ]


def test_several_choices_and_a_name_of_ones_own(live: moe_lens.LiveTrace) -> None:
    two = Served([1, 2, 3], [[4, 5, 6], [7]])
    assert live.add(output_of(two), request="mine") == 2
    live.flush()
    assert in_trace(live.run) == expected("mine/0", two.ids[0]) | expected("mine/1", two.ids[1])
    assert (live.sequences, live.tokens) == (2, 8)


def test_what_is_not_finished_or_never_ran_is_nothing(live: moe_lens.LiveTrace) -> None:
    begun = RequestOutput("a", [1, 2], [CompletionOutput(0, [3], None, None)], finished=False)
    aborted = RequestOutput("a", [1, 2], [CompletionOutput(0, [], None, "abort")])
    assert live.add(begun) == live.add(aborted) == 0
    assert live.refused == 0


def test_token_ids_only_if_asked(tmp_path: Path) -> None:
    for keep in (False, True):
        run = tmp_path / str(keep)
        with moe_lens.LiveTrace(run, token_ids=keep, **SHAPE) as live:
            live.add(output_of(ONE))
            live.add_routing(choices(2), token_ids=[1, 2])
        ids = {r["token_id"] for r in rows(run, "select token_id from tokens")}
        assert ids == ({1, 2, 5, 6, 7, 8} if keep else {None})


def test_prompt_start_and_cached_prefix(live: moe_lens.LiveTrace) -> None:
    started = Served(list(range(10)), [[20, 21]], name="s", start=4)
    cached = Served(list(range(10)), [[20, 21]], name="c", cached=8)
    live.add(output_of(started), prompt_start=4)
    live.add(output_of(cached))
    live.flush()
    assert in_trace(live.run) == expected("s", started.ids[0], 4) | expected(
        "c", cached.ids[0][8:], 8
    )


def test_config_of_the_model(tmp_path: Path) -> None:
    said = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "mlp_only_layers": [0],
        "hidden_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(said))
    with moe_lens.LiveTrace(tmp_path / "run", config=tmp_path) as live:
        live.add(output_of(ONE))
    meta = json.loads((tmp_path / "run" / "meta" / "rank=0.json").read_text())
    assert [(x["layer"], x["block"], x["hidden_size"]) for x in meta["layers"]] == [
        (0, 1, 64),
        (1, 2, 64),
        (2, 3, 64),
    ]
    assert meta["model"] == "Qwen3MoeForCausalLM"
    assert meta["steps"].startswith("synthetic")
    assert meta["weights"] == "none"
    assert {"weights", "entropy", "steps", "times"} <= set(meta["lacks"])
    assert meta["attempts"][0]["end"] == "closed"


# -- what is refused -------------------------------------------------------------------------------


def changed(**to: Any) -> dict[str, Any]:
    said = ONE.chat(token_ids=True)
    said["choices"][0].update(to)
    return said


ALL_ZERO = numpy2base64(np.zeros_like(ONE.ids[0]))
TWICE = ONE.ids[0].copy()
TWICE[2, 3] = 5
TOO_HIGH = ONE.ids[0].copy()
TOO_HIGH[1, 2, 0] = 16

BAD: dict[str, tuple[Any, str]] = {
    "no routing": (changed(routed_experts=None), "no routed_experts: was the server started"),
    "no field": ({"choices": [{"message": {}}]}, "no routing in it: was the server started"),
    "a row too few": (
        changed(routed_experts=numpy2base64(choices(3))),
        "3 rows of routing, but 4 tokens ran",
    ),
    "a piece of a stream": (
        RequestOutput("a", [5, 6, 7], [CompletionOutput(0, [9], ONE.ids[0])]),
        "4 rows of routing, but 3 tokens ran (prompt 3 + generated 1 - 1): it is a chunk",
    ),
    "no base64": (changed(routed_experts="%%%"), "routed_experts is no base64"),
    "torn": (changed(routed_experts=numpy2base64(ONE.ids[0])[:-8]), "is no .npy file"),
    "another model": (
        changed(routed_experts=numpy2base64(choices(4, B=6))),
        "an array of (4, 6, 2), not of [tokens, 4 decoder blocks, top-2]",
    ),
    "floats": (
        RequestOutput("a", [1], [CompletionOutput(0, [1], choices(1) / 2)]),
        "expert ids are float64, not integers",
    ),
    "all zeros": (changed(routed_experts=ALL_ZERO), "layer 0: all ids are 0"),
    "an expert twice": (
        changed(routed_experts=numpy2base64(TWICE)),
        "layer 2, token 2: [5, 5] names an expert twice",
    ),
    "no such expert": (
        changed(routed_experts=numpy2base64(TOO_HIGH)),
        "layer 1, token 1: expert 16 of 16",
    ),
    "an error": ({"response": None, "custom_id": "a", "error": "oom"}, "the request failed (oom)"),
    "choices that are none": ({"choices": [None]}, "no routing in it"),
    "text": ("{}", "a str is no answer of vLLM or SGLang: give an array to add_routing"),
    "nothing": (None, "a NoneType is no answer"),
}


ARRAYS: list[dict[str, Any]] = [
    {"ids_TBK": choices(2)[0]},
    {"ids_TBK": [[[1], [2, 3]]]},
    {"ids_TBK": choices(2), "token_ids": [1]},
    *({"ids_TBK": choices(2), "prompt_tokens": n} for n in (-1, 1.5)),
    *({"ids_TBK": choices(2), "first_position": n} for n in (1 << 31, (1 << 31) - 1)),
    # What would end the writing of all others, if it came to the writer:
    *({"ids_TBK": choices(2), "request": text} for text in (5, "\ud800")),
    *({"ids_TBK": choices(2), "tag": text} for text in (5, "\ud800")),
]


def test_bad_answers_are_refused_and_the_others_stay(live: moe_lens.LiveTrace) -> None:
    want: dict[Any, list[int]] = {}
    for i, (output, says) in enumerate(BAD.values()):
        good = Served([1] * (i + 1), [[2, 3]], name=f"good-{i}")
        live.add(output_of(good))
        want |= expected(good.name, good.ids[0])
        with pytest.raises(ImportRefused) as e:
            live.add(output)
        assert says in str(e.value)
        assert "\n" not in str(e.value)
    for bad in ARRAYS:
        with pytest.raises(ImportRefused):
            live.add_routing(**bad)
    live.close()
    assert in_trace(live.run) == want
    assert live.refused == len(BAD) + len(ARRAYS)
    meta = json.loads((live.run / "meta" / "rank=0.json").read_text())
    assert meta["warnings"] == {module.REFUSED: live.refused}


def test_follow_passes_all_on_and_warns(live: moe_lens.LiveTrace) -> None:
    outputs = [output_of(ONE), RequestOutput("bad", [1], [CompletionOutput(0, [2], None)])]
    with pytest.warns(RuntimeWarning, match="not in the trace: request 1: no routed_experts"):
        assert list(live.follow(outputs, tag="offline")) == outputs
    assert (live.sequences, live.refused) == (1, 1)


def test_follow_loses_no_answer_that_cannot_be_written(live: moe_lens.LiveTrace) -> None:
    live.close()
    passed = live.follow([output_of(ONE), output_of(ONE)])
    assert next(passed).request_id == "cmpl-1"
    with pytest.raises(TraceWriteError, match="is closed"):
        next(passed)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({}, "give experts=, or config="),
        ({"experts": 16, "top_k": 2}, "give blocks=, or config="),
        ({"experts": 1, "top_k": 2, "blocks": 4}, "2 choices a token of 1 experts"),
        ({"experts": 16, "top_k": 2, "blocks": 2, "dense_blocks": [2]}, "there is no block 2"),
        ({"config": "nowhere.json"}, "nowhere.json cannot be read"),
    ],
)
def test_shape_of_the_model_has_to_be_known(
    tmp_path: Path, shape: dict[str, Any], says: str
) -> None:
    with pytest.raises(ImportRefused, match=says):
        moe_lens.LiveTrace(tmp_path / "run", **shape)
    assert not (tmp_path / "run").exists()


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with moe_lens.LiveTrace(run, **SHAPE) as live:
        live.add(output_of(ONE))
        with pytest.raises(TraceLocked):
            moe_lens.LiveTrace(run, force=True, **SHAPE)
    with pytest.raises(ImportRefused, match="give force=True to replace it"):
        moe_lens.LiveTrace(run, **SHAPE)
    moe_lens.LiveTrace(run, force=True, **SHAPE).close()
    assert rows(run, "select * from steps") == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("…")
    with pytest.raises(ImportRefused, match="is not a trace"):
        moe_lens.LiveTrace(tmp_path / "mine", force=True, **SHAPE)
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_after_the_end(live: moe_lens.LiveTrace) -> None:
    live.close()
    live.close()
    for late in (lambda: live.add(output_of(ONE)), live.flush):
        with pytest.raises(TraceWriteError, match="is closed"):
            late()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_refused_and_harms_nothing(live: moe_lens.LiveTrace) -> None:
    """The thread that writes is not in it: what it adds would be lost, and its flush never end."""
    live.add(output_of(ONE))
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # should it wait
        refused = 0
        for late in (lambda: live.add(output_of(ONE)), lambda: live.add_routing([]), live.flush):
            try:
                late()
            except TraceWriteError as e:
                refused += "was forked" in str(e)
        live.close()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    live.add(output_of(ONE), request="second")
    live.flush()
    assert in_trace(live.run) == expected("cmpl-1", ONE.ids[0]) | expected("second", ONE.ids[0])


def test_an_error_of_the_server_is_in_the_meta(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        with moe_lens.LiveTrace(tmp_path / "run", **SHAPE) as live:
            live.add(output_of(ONE))
            raise KeyError("model")
    meta = json.loads((tmp_path / "run" / "meta" / "rank=0.json").read_text())
    assert (meta["attempts"][0]["end"], meta["attempts"][0]["error"]) == (
        "failed",
        "KeyError: 'model'",
    )
    assert in_trace(tmp_path / "run") == expected("cmpl-1", ONE.ids[0])


# -- threads, readers, kills -----------------------------------------------------------------------


def test_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at once, with a queue so short that they wait for the writer, flushing in between."""
    monkeypatch.setattr(module, "QUEUE_BYTES", 500)
    served = [Served([i % 7] * (1 + i % 13), [[1] * (1 + i % 4)], name=f"r{i}") for i in range(160)]
    with moe_lens.LiveTrace(
        tmp_path / "run", batching=Batching(tokens=32, sequences=5), **SHAPE
    ) as live:

        def work(i: int) -> None:
            live.add(output_of(served[i]) if i % 2 else served[i].chat(), tag=f"t{i % 3}")
            if i % 40 == 7:
                live.flush()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(len(served))))
    want: dict[Any, list[int]] = {}
    counts: Counter[tuple[int, str, int]] = Counter()
    for i, x in enumerate(served):
        want |= expected(x.name, x.ids[0])
        for (_, _, layer), ids in expected(x.name, x.ids[0]).items():
            counts.update((layer, f"t{i % 3}", e) for e in ids)
    assert in_trace(live.run) == want
    load = rows(live.run, "select layer, tag, expert, sum(routed)::int n from load group by all")
    assert {(r["layer"], r["tag"], r["expert"]): r["n"] for r in load} == counts
    assert live.tokens == sum(len(x.ids[0]) for x in served)


def test_readers_see_what_was_flushed_while_it_is_written(live: moe_lens.LiveTrace) -> None:
    want: dict[Any, list[int]] = {}
    for i in range(4):
        x = Served([1] * (i + 2), [[2, 3]], name=f"r{i}")
        live.add(output_of(x))
        want |= expected(x.name, x.ids[0])
        live.flush()
        assert in_trace(live.run) == want


def test_flushes_by_itself(tmp_path: Path) -> None:
    with moe_lens.LiveTrace(tmp_path / "run", flush_seconds=0.05, **SHAPE) as live:
        live.add(output_of(ONE))
        for _ in range(200):
            if in_trace(live.run):
                break
            threading.Event().wait(0.05)
        assert in_trace(live.run) == expected("cmpl-1", ONE.ids[0])


def test_the_disk_refuses(live: moe_lens.LiveTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    live.add(output_of(ONE))
    live.flush()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_lens.trace.store.TraceStore.append", full)
    live.add(output_of(ONE), request="second")
    with pytest.raises(TraceWriteError, match="No space left on device"):
        live.flush()
    with pytest.raises(TraceWriteError, match="No space left on device"):
        live.add(output_of(ONE))
    with pytest.raises(TraceWriteError, match="No space left on device"):
        live.close()
    assert in_trace(live.run) == expected("cmpl-1", ONE.ids[0])


CHILD = """
import os, sys
import moe_lens
from support.engines.vllm_answers import Served, output_of

live = moe_lens.LiveTrace(sys.argv[1], experts=16, top_k=2, blocks=4, dense_blocks=[0])
for i in range(1_000_000):
    live.add(output_of(Served([1] * (1 + i % 9), [[2, 3]], name=f"r{i}")))
    if i % 25 == 24:
        live.flush()
        os.write(1, f"{i}\\n".encode())
"""


def test_what_was_flushed_survives_a_kill(tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert child.stdout is not None
    for _ in range(4):
        assert child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    said, _ = child.communicate()
    assert child.returncode == -signal.SIGKILL
    flushed = int(said.split()[-1]) if said else 99
    want: dict[Any, list[int]] = {}
    for i in range(flushed + 1):
        x = Served([1] * (1 + i % 9), [[2, 3]], name=f"r{i}")
        want |= expected(x.name, x.ids[0])
    got = in_trace(run)
    assert {k: v for k, v in got.items() if int(k[0][1:]) <= flushed} == want
    moe_lens.recover(run)
    assert in_trace(run) == got


def test_ends_by_itself_with_the_interpreter(tmp_path: Path) -> None:
    """Whoever forgets to close it loses nothing."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    child = CHILD.replace("1_000_000", "3")
    subprocess.run(
        [sys.executable, "-c", child, str(tmp_path / "run")],
        check=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,
    )
    assert len({r for r, _, _ in in_trace(tmp_path / "run")}) == 3
    meta = json.loads((tmp_path / "run" / "meta" / "rank=0.json").read_text())
    assert meta["attempts"][0]["end"] == "closed"


def test_needs_neither_torch_nor_duckdb() -> None:
    code = (
        "import sys, moe_lens; moe_lens.LiveTrace; "
        "assert not {'torch', 'duckdb', 'vllm', 'streamlit'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

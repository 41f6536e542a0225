"""From items to a trace: counted by a loop, refused with the place, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.routed import E, K, L, MadeUp, choices, counted, layers, requests, routed

import moe_lens
from moe_lens.errors import ImportRefused, TraceLocked, TraceWriteError
from moe_lens.importers import importing
from moe_lens.importers.batching import Batching
from moe_lens.importers.importing import Imported, import_trace
from moe_lens.importers.source import (
    Choices,
    Counted,
    Given,
    Item,
    Pass,
    Sequence,
    Tokens,
)
from moe_lens.trace.lock import RankLock


@pytest.fixture
def do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports what a made-up format holds; the folder has nothing but the file before."""
    path = tmp_path / "file"
    path.write_bytes(b"made up")

    def run(form: MadeUp, **more: Any) -> Imported:
        monkeypatch.setattr(importing, "format_named", lambda _: form)
        return import_trace(path, tmp_path / "run", format="made-up", **more)

    return run


def a_pass(T: int, step: int = 0, seed: int = 0, **more: Any) -> Pass:
    ids_TLK = choices(T, seed)
    of = {i: Choices(ids_TLK[:, i]) for i in range(L)}
    return Pass(f"record {step}", step, 0, "train", of, **more)


def nothing_left(tmp_path: Path) -> bool:
    return [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_was_routed_comes_out_of_sql_to_the_token(do: Any, tmp_path: Path) -> None:
    items: list[Item] = list(requests(7))
    done = do(MadeUp(items), batching=Batching(5, 3))
    expected: Counter[tuple[int, int]] = Counter()
    truth = {}
    for number, s in enumerate(requests(7)):
        for t, ids_LK in enumerate(s.ids_TLK):
            truth[number, s.first_position + t] = ids_LK
            for layer in range(L):
                for e in ids_LK[layer].tolist():
                    expected[layer, e] += 1
    assert counted(done.run) == expected
    found = routed(done.run)
    assert found.keys() == truth.keys()
    assert all((found[key] == ids).all() for key, ids in truth.items())
    assert done.tokens == len(truth)
    assert done.token_layers == L * len(truth)
    assert done.sequences == 7
    assert "synthetic" in done.steps
    with moe_lens.open(done.run) as trace:
        of = trace.sql("select sequence, tag, request from sequences order by 1").rows()
        assert [(r["tag"], r["request"]) for r in of] == [
            (("code", "chat")[i % 2], f"r{i}") for i in range(7)
        ]
        (run,) = trace.info().runs
        assert run.lacks == {"entropy": "nobody recorded it"}
        assert run.made_steps == done.steps
        assert "nobody recorded it" in repr(trace.info())
        weights: Any = trace.sql(
            "select t.sequence s, t.position p, weights from routing r join tokens t using "
            "(step, forward, token) where layer = 2"
        ).rows()
    for row in weights:
        s = requests(7)[row["s"]]
        assert s.weights_TLK is not None
        assert np.array_equal(
            s.weights_TLK[row["p"] - s.first_position, 2], np.array(row["weights"], np.float32)
        )


def test_weights_times_and_tokens_that_are_not_there_are_null(do: Any) -> None:
    done = do(MadeUp([a_pass(6)]))
    with moe_lens.open(done.run) as trace:
        (row,) = trace.sql("select * from steps").rows()
        assert row["t_start_ns"] is None
        assert row["host_ns"] is None
        assert row["tokens"] == 6
        assert trace.sql("select weights, entropy from routing").rows() == [
            {"weights": None, "entropy": None}
        ] * (6 * L)
        assert trace.sql("from tokens").rows() == []
        assert trace.sql("select distinct weight_sum, prob_sum from load").rows() == [
            {"weight_sum": None, "prob_sum": None}
        ]
        assert trace.info().runs[0].weights == "none"


def test_a_token_id_that_is_not_known_is_null(do: Any) -> None:
    first, second = requests(2)
    second.token_id_T = None
    done = do(MadeUp([first, second]))
    with moe_lens.open(done.run) as trace:
        rows = trace.sql(
            "select sequence, count(token_id) n from tokens group by 1 order by 1"
        ).rows()
    assert rows == [{"sequence": 0, "n": len(first.ids_TLK)}, {"sequence": 1, "n": 0}]


def test_weights_that_one_of_several_sequences_lacks_are_refused(do: Any, tmp_path: Path) -> None:
    first, second = requests(2)
    first.prompt_tokens = second.prompt_tokens = None
    second.weights_TLK = None
    with pytest.raises(ImportRefused, match=r"request 0 to request 1.* weight is not finite"):
        do(MadeUp([first, second]))
    assert nothing_left(tmp_path)


def test_logits_become_entropy_margin_and_z_loss(do: Any) -> None:
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(size=(5, E)).astype(np.float32)
    logits_TE[3, 2] = np.nan
    ids_TK = np.argsort(-np.nan_to_num(logits_TE), axis=1)[:, :K]
    infos = layers(1)
    infos[0].score = "softmax"
    of = {0: Choices(ids_TK, logits_TE=logits_TE)}
    done = do(MadeUp([Pass("record 0", 0, 0, "train", of)], infos=infos))
    z = np.delete(logits_TE, 3, 0).astype(float)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    best = np.sort(z, axis=1)[:, ::-1]
    with moe_lens.open(done.run) as trace:
        row: Any
        (row,) = trace.sql("select * from routers").rows()
        loads: Any = trace.sql("select expert, prob_sum from load order by 1").rows()
    assert row["nonfinite_tokens"] == 1
    assert row["entropy_sum"] == pytest.approx(-(p * np.log(p)).sum())
    assert row["top1_prob_sum"] == pytest.approx(p.max(1).sum())
    assert row["zloss_sum"] == pytest.approx((np.log(np.exp(z).sum(1)) ** 2).sum())
    assert row["margin_sum"] == pytest.approx((best[:, K - 1] - best[:, K]).sum())
    assert [r["prob_sum"] for r in loads] == pytest.approx(p.sum(0), rel=3e-4)


def test_a_margin_is_not_made_of_logits_that_did_not_decide(do: Any) -> None:
    logits_TE = np.arange(E, dtype=np.float32)[None, :]
    of = {0: Choices(np.array([[0, 1, 2]]), logits_TE=logits_TE)}  # the smallest: a bias chose
    done = do(MadeUp([Pass("record 0", 0, 0, "train", of)], infos=layers(1)))
    with moe_lens.open(done.run) as trace:
        (row,) = trace.sql("select margin_sum, entropy_sum from routers").rows()
    assert row == {"margin_sum": None, "entropy_sum": None}  # and no score: no entropy


def test_padding_is_marked_and_in_no_count(do: Any) -> None:
    padding_T = np.array([False, True, False, True])
    tokens = Tokens(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), padding_T=padding_T)
    item = a_pass(4, tokens=tokens)
    done = do(MadeUp([item]))
    expected = Counter(
        (i, int(e)) for i in range(L) for e in item.choices[i].ids_TK[~padding_T].ravel()
    )
    assert counted(done.run) == expected
    assert done.tokens == 2
    with moe_lens.open(done.run) as trace:
        assert trace.sql("select sum(padding)::int n from load").rows() == [{"n": 2 * L * K}]
        assert trace.sql("select count(*) n from tokens where padding").rows() == [{"n": 2}]


def test_slots_of_a_dynamic_k_may_be_empty(do: Any) -> None:
    ids_TK = np.array([[3, -1, 5], [-1, -1, 2]])
    done = do(
        MadeUp([Pass("record 0", 0, 0, "train", {0: Choices(ids_TK)})], infos=layers(1, top_k=None))
    )
    assert counted(done.run) == Counter({(0, 3): 1, (0, 5): 1, (0, 2): 1})
    with moe_lens.open(done.run) as trace:
        rows = trace.sql("select expert_ids from routing order by token").rows()
    assert rows == [{"expert_ids": [3, 5]}, {"expert_ids": [2]}]


def test_counts_alone_make_a_trace_without_rows(do: Any) -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(5, [1 / 4] * 4, size=(3, 2)) * 0 + 1
    of = [
        Counted(f"pass {i}", i, 0, "unknown", {k: counts[i, k] for k in range(2)}) for i in range(3)
    ]
    done = do(MadeUp(list(of), infos=layers(2, experts=4, top_k=2)))
    assert done.tokens == 6
    assert done.token_layers == 12
    assert counted(done.run) == Counter({(i, e): 3 for i in range(2) for e in range(4)})
    with moe_lens.open(done.run) as trace:
        assert trace.info().runs[0].sampling == "none"
        assert trace.info().runs[0].token_rows == 0


def test_more_tags_than_32_are_other_and_a_stated_tag_is_of_the_untagged(do: Any) -> None:
    sequences = requests(40)
    for i, s in enumerate(sequences):
        s.tag = f"t{i}" if i else None
    done = do(MadeUp(list(sequences)), given=Given(tag="mine"))
    with moe_lens.open(done.run) as trace:
        tags = {r["tag"] for r in trace.sql("select distinct tag from slices").rows()}
        assert trace.info().runs[0].warnings
    assert len(tags) == 33
    assert {"mine", "other"} <= tags
    assert "t39" not in tags


def test_a_copy_is_in_no_sum(do: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    form = MadeUp([a_pass(5)], [a_pass(5)])
    opened = form.open_source

    def with_copy(path: Path, given: Given) -> Any:
        source = opened(path, given)
        source.ranks[1].copy = True
        return source

    monkeypatch.setattr(form, "open_source", with_copy)
    done = do(form)
    assert done.tokens == 5
    assert sum(counted(done.run).values()) == 5 * L * K


def test_ranks_with_tokens_of_their_own_are_added_up(do: Any) -> None:
    done = do(MadeUp([a_pass(5)], [a_pass(7, seed=1), a_pass(2, 1)]))
    assert (done.passes, done.tokens, done.token_layers) == (3, 14, 14 * L)
    assert sum(counted(done.run).values()) == 14 * L * K


def bad(change: Any) -> Pass:
    item = a_pass(6, 1)
    change(item)
    return item


def into(item: Pass, layer: int, token: int, ids: list[int]) -> None:
    ids_TK = item.choices[layer].ids_TK.astype(np.int64)
    ids_TK[token] = ids
    item.choices[layer].ids_TK = ids_TK


REFUSED = [
    (lambda x: into(x, 2, 4, [0, 1, E]), "record 1, layer 2, token 4: expert 12 of 12"),
    (
        lambda x: (into(x, 2, 4, [0, 1, E]), into(x, 3, 0, [0, 1, E + 3])),
        "record 1, layer 2, token 4: expert 12 of 12",
    ),
    (
        lambda x: (into(x, 1, 5, [0, -1, 2]), into(x, 3, 0, [0, -7, 2])),
        r"record 1, layer 1, token 5: no expert \(-1\)",
    ),
    (lambda x: into(x, 2, 4, [0, 1, 1 << 20]), "expert 1048576 of 12: this is no expert id"),
    (lambda x: into(x, 0, 0, [0, 1, 1 << 40]), "record 1: an expert id is 1099511627776"),
    (lambda x: into(x, 1, 5, [0, -1, 2]), r"record 1, layer 1, token 5: no expert \(-1\)"),
    (lambda x: into(x, 1, 5, [0, -7, 2]), "record 1, layer 1, token 5: expert -7"),
    (lambda x: into(x, 3, 2, [4, 7, 4]), r"layer 3, token 2: \[4, 7, 4\] names an expert twice"),
    (lambda x: setattr(x.choices[1], "ids_TK", np.zeros((6, K), int)), "layer 1: all ids are 0"),
    (lambda x: setattr(x.choices[1], "ids_TK", np.ones((6, K))), "float64, not integers"),
    (lambda x: setattr(x.choices[1], "ids_TK", x.choices[1].ids_TK[:5]), "layer 1: 5 rows, but 6"),
    (lambda x: setattr(x.choices[1], "ids_TK", np.ones(6, int)), r"layer 1: ids of \(6,\)"),
    (lambda x: x.choices.pop(2), "record 1: layer 2 is missing"),
    (lambda x: x.choices.update({9: x.choices[0]}), "record 1: there is no layer 9"),
    (lambda x: setattr(x, "step", 0), "step 0, forward 0 after step 0, forward 0"),
    (
        lambda x: setattr(x, "tokens", Tokens(np.arange(6), np.arange(5))),
        "record 1: 5 positions for 6 tokens",
    ),
    (
        lambda x: setattr(x, "tokens", Tokens(np.arange(6), np.arange(6) - 1)),
        "record 1: a position is -1",
    ),
    (
        lambda x: setattr(x.choices[0], "weights_TK", np.full((6, K), np.nan, np.float32)),
        "record 1, layer 0, token 0: a gate weight is not finite",
    ),
    (
        lambda x: setattr(x.choices[0], "weights_TK", np.ones((6, 2), np.float32)),
        r"layer 0: weights of \(6, 2\)",
    ),
    (
        lambda x: setattr(x.choices[0], "logits_TE", np.ones((6, 2), np.float32)),
        r"layer 0: logits of \(6, 2\), not of \(6, 12\)",
    ),
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=[t for _, t in REFUSED])
def test_what_no_router_does_is_refused_and_leaves_nothing(
    do: Any, tmp_path: Path, change: Any, text: str
) -> None:
    with pytest.raises(ImportRefused, match=text) as error:
        do(MadeUp([a_pass(6), bad(change)]))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "file") in str(error.value)
    assert nothing_left(tmp_path)


COUNTS = [
    ([3, 2, 1, 1], "layer 0: 7 choices are no multiple of top-2"),
    ([3, -1, 1, 1], "layer 0: expert 1 has -1 tokens"),
    ([7, 1, 0, 0], "layer 0: 4 tokens of top-2, but expert 0 has 7"),
    ([1, 1, 1], r"layer 0: counts of \(3,\), not of 4 experts"),
]


@pytest.mark.parametrize(("count", "text"), COUNTS, ids=[t for _, t in COUNTS])
def test_counts_that_no_top_k_gives_are_refused(do: Any, count: list[int], text: str) -> None:
    item = Counted("pass 0", 0, 0, "unknown", {0: np.array(count)})
    with pytest.raises(ImportRefused, match=text):
        do(MadeUp([item], infos=layers(1, experts=4, top_k=2)))


def test_counts_without_a_top_k_are_refused(do: Any) -> None:
    item = Counted("pass 0", 0, 0, "unknown", {0: np.array([1, 1])})
    with pytest.raises(ImportRefused, match="give --top-k"):
        do(MadeUp([item], infos=layers(1, experts=2, top_k=None)))


def test_a_layer_of_one_choice_that_is_always_expert_0_was_never_filled(
    do: Any, tmp_path: Path
) -> None:
    of = {0: Choices(np.zeros((300, 1), np.uint8))}
    with pytest.raises(ImportRefused, match="layer 0: all 300 choices are expert 0"):
        do(MadeUp([Pass("record 0", 0, 0, "train", of)], infos=layers(1, top_k=1)))
    assert nothing_left(tmp_path)
    few = {0: Choices(np.zeros((30, 1), np.uint8))}
    assert do(MadeUp([Pass("record 0", 0, 0, "train", few)], infos=layers(1, top_k=1))).tokens == 30


def test_a_file_without_a_token_is_refused(do: Any, tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="holds no token"):
        do(MadeUp([]))
    assert nothing_left(tmp_path)


def test_a_reader_that_fails_leaves_nothing(do: Any, tmp_path: Path) -> None:
    class Torn(Sequence):
        pass

    def items() -> Any:
        yield a_pass(6)
        raise KeyboardInterrupt

    form = MadeUp([])
    form.ranks = [items()]  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        do(form)
    assert nothing_left(tmp_path)


def test_a_trace_that_is_there_stays_unless_replaced(do: Any, tmp_path: Path) -> None:
    do(MadeUp([a_pass(6)]))
    with pytest.raises(ImportRefused, match="holds a trace already"):
        do(MadeUp([a_pass(7)]))
    with pytest.raises(ImportRefused, match="layer 1, token 0"):
        do(MadeUp([bad(lambda x: into(x, 1, 0, [0, 0, 0]))]), force=True)
    assert sum(counted(tmp_path / "run").values()) == 6 * L * K  # the old one, whole
    do(MadeUp([a_pass(7)]), force=True)
    assert sum(counted(tmp_path / "run").values()) == 7 * L * K


def test_an_old_trace_comes_back_where_the_new_one_cannot_be_put(
    do: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do(MadeUp([a_pass(6)]))
    rename = Path.rename

    def refuses(self: Path, target: Path) -> Path:
        if self.name.endswith(".importing"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(TraceWriteError, match="No space left"):
        do(MadeUp([a_pass(7)]), force=True)
    assert sum(counted(tmp_path / "run").values()) == 6 * L * K
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def test_a_file_inside_the_trace_that_goes_is_refused(do: Any, tmp_path: Path) -> None:
    do(MadeUp([a_pass(6)]))
    inside = tmp_path / "run" / "answers.jsonl"
    inside.write_text("mine")
    with pytest.raises(ImportRefused, match=r"lies in .*run, which would be replaced"):
        import_trace(inside, tmp_path / "run", format="made-up", force=True)
    assert inside.read_text() == "mine"


@pytest.mark.parametrize(("top_k", "experts"), [(0, 4), (5, 4), (2, (1 << 20) + 1), (None, 0)])
def test_a_layer_that_no_model_has_is_refused(
    do: Any, tmp_path: Path, top_k: int | None, experts: int
) -> None:
    with pytest.raises(ImportRefused, match=rf"of {experts} experts\."):
        do(MadeUp([a_pass(6)], infos=layers(1, experts, top_k)))
    assert nothing_left(tmp_path)


def test_a_tag_that_is_no_whole_text_is_refused(do: Any, tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"--tag: the tag .* is no whole text"):
        do(MadeUp([a_pass(6)]), given=Given(tag="\udc80"))
    assert nothing_left(tmp_path)


def test_a_folder_that_is_no_trace_is_not_replaced(do: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(ImportRefused, match="is not a trace"):
        do(MadeUp([a_pass(6)]), force=True)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "mine"


def test_a_trace_that_is_being_written_is_not_replaced(do: Any, tmp_path: Path) -> None:
    do(MadeUp([a_pass(6)]))
    lock = RankLock(tmp_path / "run", 0)
    with pytest.raises(TraceLocked):
        do(MadeUp([a_pass(6)]), force=True)
    lock.release()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from support.routed import MadeUp, requests
    from moe_lens.importers import importing

    def items():
        yield from requests(300)
        os.kill(os.getpid(), signal.SIGKILL)

    form = MadeUp([])
    form.ranks = [items()]
    importing.format_named = lambda _: form
    importing.import_trace(Path(sys.argv[1]), Path(sys.argv[2]), format="made-up")
"""


def test_a_kill_leaves_no_trace_and_the_next_import_clears_up(do: Any, tmp_path: Path) -> None:
    support = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(support)}
    script = [sys.executable, "-c", textwrap.dedent(KILLED)]
    ended = subprocess.run([*script, tmp_path / "file", tmp_path / "run"], env=env, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "run").exists()
    assert (tmp_path / ".run.importing").is_dir()
    do(MadeUp([a_pass(6)]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def test_what_is_no_known_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ImportRefused, match=r"notes.txt is in no format that is known here"):
        import_trace(tmp_path / "notes.txt", tmp_path / "run")
    with pytest.raises(ImportRefused, match="no format is called 'sgl'"):
        import_trace(tmp_path / "notes.txt", tmp_path / "run", format="sgl")
    with pytest.raises(ImportRefused, match="does not exist"):
        import_trace(tmp_path / "none", tmp_path / "run")

"""moe-policylang 1.15: Parquet or JSONL of `record_trace`, a row for each token and layer.

Its recorder (integrations/trace_recorder.py) generates prompt by prompt, and appends as its hooks
fire: forward by forward, in it layer by layer, in it token by token. That order is the forwards,
which no column tells: it is checked, and a file whose rows were sorted otherwise is refused. A
prompt becomes a step, with the forwards that generated it.

`router_scores` are the k largest of the softmax of the gate's output (lines 412-428), whatever the
model makes of them: neither renormalised nor scaled nor biased. They are taken as the weights, and
the trace says so. A session saved by its vLLM extension has a `router_softmax` that was made up of
the weights (vllm_extensions.py:98-113, one value for all experts that were not chosen): it is no
distribution of a router, and left out.

N rows of a forward, T tokens of it, L layers, K choices, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats._policylang_rows import (
    HEADER,
    KEYS,
    MISSING,
    Ints,
    Rows,
    Table,
    Values,
    joined,
)
from moe_lens.importers.source import (
    UNKNOWN_PHASE,
    Choices,
    Given,
    Item,
    Pass,
    Rank,
    Source,
    Tokens,
)
from moe_lens.trace.meta import LayerInfo

SAYS = "moe-policylang record_trace: .parquet or .jsonl"

AS_WEIGHTS = (
    "weights are router_scores: the router's softmax over all experts at the chosen ones, before "
    "the model normalises or scales it"
)
MADE_UP = "router_softmax left out: it was made up of the weights of the chosen experts"

LACKS = {
    "times": "moe-policylang records no times",
    "losses": "token_loss is not read",
}
_OPTIONAL = {
    "weights": ("router_scores", "recorded without router_scores"),
    "token ids": ("token_id", "recorded without record_token_ids"),
    "phases": ("phase", "recorded without record_phase: give --phase"),
}
WIDTHS = (("router_softmax", "softmax_NE"), ("router_logits", "logits_NE"))


def recognises(path: Path, head: bytes) -> bool:
    """A Parquet file with its keys, or JSON lines with its header."""
    try:
        if head.startswith(b"PAR1"):
            return set(KEYS) <= set(pq.read_schema(path).names)
        said = json.loads(head.split(b"\n", 1)[0])
    except (pa.ArrowException, OSError, ValueError, RecursionError):
        return False
    return isinstance(said, dict) and all(key in said for key in HEADER)


def open_source(path: Path, given: Given) -> Source:
    """Open a file.

    Args:
        path: Of the file.
        given: The experts must be in it where the file has neither a header nor a distribution;
            top-k is checked.

    Raises:
        ImportRefused: No trace of moe-policylang, damaged, or short of a fact.
    """
    table = Table(path)
    first = next(table.rows(), None)
    if first is None:
        raise ImportRefused(f"{path} has no rows.")
    experts, top_k = _sizes(table, first, given)
    layers = _layers(table)
    said = table.header.get("num_layers", len(layers))
    if said != len(layers):
        raise ImportRefused(
            f"{path}: rows of {len(layers)} layers, but its first line speaks of {said}."
        )
    if len(layers) == 1 and (first.word.get("phase", np.array([MISSING])) == MISSING).any():
        raise ImportRefused(
            f"{path}: rows of a single layer do not tell forwards apart without a phase: record "
            "with record_phase=True."
        )
    made_up = first.softmax_NE is not None and _made_up(first.softmax_NE, first.ids_NK)
    notes = {AS_WEIGHTS: 1} if first.scores_NK is not None else {}
    lacks = LACKS | {
        what: why for what, (name, why) in _OPTIONAL.items() if not _has(table, first, name)
    }
    if not any(_has(table, first, name) for name in ("domain_tag", "language_tag")):
        lacks["tags"] = "recorded without prompt_domain_tags"
    if made_up:
        notes[MADE_UP] = 1
    if made_up or first.softmax_NE is None:
        lacks["entropy"] = (
            "the distribution in it is none of a router"
            if made_up
            else "recorded without record_full_softmax"
        )
    return Source(
        layers=[
            LayerInfo(
                layer=i,
                path=f"layer {number}" if made_up else f"block {number}",
                block=None if made_up else number,
                experts=experts,
                top_k=top_k,
            )
            for i, number in enumerate(layers)
        ],
        ranks=[Rank(0, partial(_passes, path, layers, experts, top_k, made_up), path)],
        lacks=lacks,
        model=str(table.header.get("model_name") or given.model or ""),
        notes=notes,
    )


# -- what it is of ---------------------------------------------------------------------------------


def _has(table: Table, first: Rows, name: str) -> bool:
    """Whether the first rows have a value there."""
    if name not in table.columns:
        return False
    if name == "token_id":
        return first.token_id_N is not None and bool((first.token_id_N != MISSING).any())
    return name not in first.word or bool((first.word[name] != MISSING).any())


def _sizes(table: Table, first: Rows, given: Given) -> tuple[int, int]:
    """E and K, where all that speak of them agree."""
    experts = {"--experts": given.experts, "its first line": table.header.get("num_experts")}
    for name, attribute in WIDTHS:
        array = getattr(first, attribute)
        experts[name] = None if array is None else array.shape[1]
    top_k = {
        "--top-k": given.top_k,
        "its first line": table.header.get("top_k"),
        "selected_experts": first.ids_NK.shape[1],
    }
    found = []
    for what, by in (("experts", experts), ("choices a token", top_k)):
        said = {name: n for name, n in by.items() if n is not None}
        if not said:
            raise ImportRefused(
                f"{table.path}: its rows do not say of how many experts: give --experts N, or "
                "--config with the model's config.json."
            )
        if len(set(said.values())) > 1:
            both = ", ".join(f"{n} by {name}" for name, n in said.items())
            raise ImportRefused(f"{table.path}: {what} contradict each other: {both}.")
        found.append(next(iter(said.values())))
    return found[0], found[1]


def _layers(table: Table) -> list[int]:
    """Numbers of the layers: of Parquet all that occur, of JSON those of the first forward."""
    numbers: set[int] = set()
    if table.parquet:
        with pq.ParquetFile(table.path, pre_buffer=False) as file:
            for batch in file.iter_batches(1 << 20, columns=["layer_idx"]):
                numbers.update(batch.column(0).unique().to_pylist())
    else:
        for rows in table.rows():
            numbers.update(np.unique(rows.layer_N).tolist())
            if len(numbers) >= table.header["num_layers"]:
                break
    return sorted(numbers)


def _made_up(softmax_NE: Values, ids_NK: Values) -> bool:
    """Whether all experts that were not chosen have the same probability, in every row."""
    N, E = softmax_NE.shape
    if E - ids_NK.shape[1] < 2 or ids_NK.min() < 0 or ids_NK.max() >= E:
        return False
    others_NE = np.ones((N, E), bool)
    np.put_along_axis(others_NE, ids_NK.astype(np.int64), False, axis=1)
    high_N = np.where(others_NE, softmax_NE, -np.inf).max(1)
    low_N = np.where(others_NE, softmax_NE, np.inf).min(1)
    return bool((high_N == low_N).all())


# -- forwards --------------------------------------------------------------------------------------


def _passes(
    path: Path, layers: list[int], experts: int, top_k: int, made_up: bool
) -> Iterator[Item]:
    table = Table(path)
    reader = _Reader(table, layers, experts, top_k, made_up)
    for rows in _forwards(table, layers):
        yield reader.read(rows)


def _forwards(table: Table, layers: list[int]) -> Iterator[Rows]:
    """Rows of one forward each: a new one begins where the layers begin again."""
    waiting: list[Rows] = []
    last = (-1, layers[-1])
    for rows in table.rows():
        prompt_N = np.concatenate([[last[0]], rows.prompt_N])
        layer_N = np.concatenate([[last[1]], rows.layer_N])
        new_N = prompt_N[1:] != prompt_N[:-1]
        if len(layers) > 1:
            new_N |= (layer_N[1:] == layers[0]) & (layer_N[:-1] != layers[0])
        else:
            decode = table.words.index("decode") if "decode" in table.words else MISSING - 1
            new_N |= rows.word["phase"] == decode
        last = (int(prompt_N[-1]), int(layer_N[-1]))
        starts = {0, *np.flatnonzero(new_N).tolist(), len(new_N)}
        for begin, end in pairwise(sorted(starts)):
            if waiting and new_N[begin]:
                yield joined(waiting)
                waiting = []
            waiting.append(rows.part(begin, end))
    if waiting:
        yield joined(waiting)


class _Reader:
    """Makes passes of forwards, and holds what one says of the next."""

    def __init__(
        self, table: Table, layers: list[int], experts: int, top_k: int, made_up: bool
    ) -> None:
        self.table = table
        self.layers = layers
        self.experts = experts
        self.top_k = top_k
        self.made_up = made_up
        self.prompt, self.token, self.forward, self.sequence = -1, 0, 0, -1
        self.phase = self.tag = ""

    def read(self, rows: Rows) -> Pass:
        """One forward.

        Raises:
            ImportRefused: Its rows are not those of a forward after the one before.
        """
        T = self._checked(rows)
        prompt = int(rows.prompt_N[0])
        new = prompt != self.prompt
        phase = self._word(rows, "phase") or UNKNOWN_PHASE
        tag = self._word(rows, "domain_tag") or self._word(rows, "language_tag")
        where = f"{self.table.place(rows.first)}, prompt {prompt}"
        if not new and phase == self.phase == "prefill":
            raise ImportRefused(
                f"{self.table.path}: {where}: the prompt in a second forward: rows are not in the "
                "order in which they were recorded."
            )
        if not new and tag != self.tag:
            raise ImportRefused(f"{self.table.path}: {where}: tag {tag!r} after {self.tag!r}.")
        if new:
            self.sequence += 1
        self.forward = 0 if new else self.forward + 1
        start = 0 if new else self.token
        self.prompt, self.token, self.phase, self.tag = prompt, start + T, phase, tag
        return Pass(
            where=where,
            step=prompt,
            forward=self.forward,
            phase=phase,
            choices=self._choices(rows, T),
            tokens=Tokens(
                sequence_T=np.full(T, self.sequence),
                position_T=np.arange(start, start + T),
                token_id_T=_token_ids(rows, T),
                tag_T=np.zeros(T, np.int32) if tag else None,
                tags=(tag,) if tag else (),
                request={self.sequence: f"prompt {prompt}"} if new else {},
            ),
        )

    def _checked(self, rows: Rows) -> int:
        """Tokens of a forward whose rows are all there, and in order."""
        prompt = int(rows.prompt_N[0])
        if prompt < self.prompt or prompt < 0:
            self._refuse(rows, 0, f"prompt {prompt} after prompt {self.prompt}: each in one piece")
        N, L = len(rows.layer_N), len(self.layers)
        T = int(np.argmax(np.append(rows.layer_N, -1) != self.layers[0]))
        if T == 0:
            self._refuse(rows, 0, f"layer {rows.layer_N[0]}, but layer {self.layers[0]} begins")
        layer_N = np.repeat(self.layers, T)
        start = 0 if prompt != self.prompt else self.token
        token_N = np.tile(np.arange(start, start + T), L)
        n = min(N, T * L)
        wrong_N = (rows.layer_N[:n] != layer_N[:n]) | (rows.token_N[:n] != token_N[:n])
        at = int(np.argmax(wrong_N)) if wrong_N.any() else n
        if at < T * L:
            found = "nothing" if at == N else f"layer {rows.layer_N[at]}, token {rows.token_N[at]}"
            what = f"layer {layer_N[at]}, token {token_N[at]}"
            self._refuse(rows, at, f"prompt {prompt}: {found}, where {what} should be")
        if N > T * L:
            self._refuse(rows, T * L, f"prompt {prompt}: a row too many in a forward")
        if rows.ids_NK.shape[1] != self.top_k:
            self._refuse(rows, 0, f"{rows.ids_NK.shape[1]} experts, but {self.top_k} before")
        for name, attribute in WIDTHS:
            array = getattr(rows, attribute)
            if array is not None and array.shape[1] != self.experts:
                self._refuse(rows, 0, f"{array.shape[1]} of {name} for {self.experts} experts")
        if rows.softmax_NE is not None:
            off_N = np.abs(rows.softmax_NE.sum(1, dtype=np.float64) - 1) > 0.02  # NaN: it says so
            if off_N.any():
                total = float(rows.softmax_NE[np.argmax(off_N)].sum())
                self._refuse(rows, int(np.argmax(off_N)), f"router_softmax adds up to {total:.3g}")
        return T

    def _refuse(self, rows: Rows, at: int, what: str) -> None:
        raise ImportRefused(
            f"{self.table.path}: {self.table.place(rows.first + at)}: {what}. Rows must be whole "
            "and in the order in which moe-policylang wrote them: by forward, layer, token."
        )

    def _word(self, rows: Rows, name: str) -> str:
        """The one word of a forward."""
        if name not in rows.word:
            return ""
        code_N = rows.word[name]
        if (code_N != code_N[0]).any():
            at = rows.first + int(np.argmax(code_N != code_N[0]))
            raise ImportRefused(
                f"{self.table.path}: {self.table.place(at)}: another {name} than in the rows "
                "before, of the same forward."
            )
        return "" if code_N[0] == MISSING else self.table.words[code_N[0]]

    def _choices(self, rows: Rows, T: int) -> dict[int, Choices]:
        arrays = {
            "ids_TK": rows.ids_NK,
            "weights_TK": rows.scores_NK,
            "logits_TE": rows.logits_NE,
            "prob_TE": None if self.made_up else rows.softmax_NE,
        }
        there = {name: x for name, x in arrays.items() if x is not None}
        return {
            i: Choices(**{name: x[i * T : (i + 1) * T] for name, x in there.items()})
            for i in range(len(self.layers))
        }


def _token_ids(rows: Rows, T: int) -> Ints | None:
    """Where all of the forward's are known: its recorder has none of tokens that it generated."""
    if rows.token_id_N is None or (rows.token_id_N == MISSING).any():
        return None
    return rows.token_id_N[:T]

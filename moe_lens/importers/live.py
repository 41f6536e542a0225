"""A trace while serving: the answers of vLLM or SGLang, with their routing, as they come.

    live = moe_lens.LiveTrace("traces/serve", experts=128, top_k=8, blocks=48)
    with live:
        for output in live.follow(llm.generate(prompts), tag="chat"):
            ...

The engine must return routing: vLLM with `enable_return_routed_experts`, SGLang with
`--enable-return-routed-experts` and `return_routed_experts` in the request. Whichever thread has an
answer calls `add`: it checks the answer and queues it; a thread of the trace's own lays sequences
into forwards (see `batching`) and writes them. The trace can be opened while it is written. What
was flushed survives `kill -9`, and all is flushed every few seconds.

T tokens, B decoder blocks, L of them with experts, K choices of a token.
"""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from moe_lens.errors import ImportRefused, TraceWriteError
from moe_lens.importers.batching import Batcher, Batching, check_sequence
from moe_lens.importers.blocks import blocks_of
from moe_lens.importers.checks import as_ids, check_ids
from moe_lens.importers.formats import _vllm_answers as vllm
from moe_lens.importers.formats._sglang_response import responses_of
from moe_lens.importers.formats.sglang_responses import sequence_of
from moe_lens.importers.importing import check_out
from moe_lens.importers.model_config import from_config
from moe_lens.importers.source import Given, Sequence
from moe_lens.importers.writing import RankWriter
from moe_lens.trace.layout import ranks as ranks_of
from moe_lens.trace.meta import Attempt, Meta

QUEUE_BYTES = 64 << 20
"""Ids of answers waiting to be written above which `add` waits: none are given up."""

REFUSED = "answers refused: damaged, or without the routing of what ran"

LACKS = {
    "weights": "serving engines return the ids of the experts, no gate weights",
    "entropy": "serving engines return no router logits",
    "steps": "engines return routing request by request: the forwards that ran them are not known",
    "times": "engines return no time of a forward",
    "tokens of cached prefixes": "no expert ran for them: they are left out, where an answer says "
    "how many they are (vLLM's does not, where it has several choices: each has the whole prompt)",
}

Output = TypeVar("Output")


@dataclass
class _Flush:
    done: threading.Event = field(default_factory=threading.Event)


class LiveTrace:
    """Writes a trace of what a serving engine answers. All methods may be called on any thread.

    Args:
        run: Folder of the trace.
        experts: Routed experts of a layer.
        top_k: Experts a token chooses.
        blocks: Decoder blocks of the model: the engine's arrays have a row for each.
        dense_blocks: Those of them without experts.
        config: The model's `config.json`, or its folder: instead of the four above.
        model: Name of the model.
        token_ids: Keep vocabulary ids. They are the users' text.
        batching: The forwards that are made up; see `Batching`.
        flush_seconds: How often all is flushed.
        force: Replace a trace that is there.

    Attributes:
        sequences: Taken so far.
        tokens: Of them.
        refused: Answers refused so far; the trace's warnings have the number too.

    Raises:
        ImportRefused: The shape of the model is not known, or something lies at `run`.
        TraceLocked: A living process writes `run`.
        TraceWriteError: The disk refuses.
    """

    def __init__(
        self,
        run: Path | str,
        *,
        experts: int | None = None,
        top_k: int | None = None,
        blocks: int | None = None,
        dense_blocks: Iterable[int] | None = None,
        config: Path | str | None = None,
        model: str | None = None,
        token_ids: bool = False,
        batching: Batching | None = None,
        flush_seconds: float = 5.0,
        force: bool = False,
    ) -> None:
        self.run = Path(run)
        self.sequences = self.tokens = self.refused = 0
        given = Given() if config is None else from_config(Path(config))
        said: dict[str, Any] = {
            "experts": experts,
            "top_k": top_k,
            "blocks": blocks,
            "dense_blocks": None if dense_blocks is None else tuple(dense_blocks),
            "model": model,
        }
        given = replace(given, **{k: v for k, v in said.items() if v is not None})
        for name in ("experts", "top_k", "blocks"):
            if getattr(given, name) is None:
                raise ImportRefused(
                    f"a live trace has to know the model first: give {name}=, or config= with its "
                    "config.json."
                )
        self._blocks = blocks_of(given, (0, given.blocks or 0, given.top_k or 0), "LiveTrace")
        self._ids_type = np.min_scalar_type(self._blocks.experts - 1)
        self._numbers = list(range(len(self._blocks.sparse)))
        self._given = given
        self._token_ids = token_ids
        self._flush_seconds = flush_seconds
        self._pid = os.getpid()
        batching = batching or Batching()
        self._batcher = Batcher(batching, self._numbers)
        self._writer = self._begin(given, batching, force)
        self._items: deque[Sequence | _Flush] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closing = self._closed = False
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="moe_lens live", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _begin(self, given: Given, batching: Batching, force: bool) -> RankWriter:
        if not force and self.run.is_dir() and ranks_of(self.run):
            raise ImportRefused(
                f"{self.run} holds a trace already: name another folder, or give force=True to "
                "replace it."
            )
        check_out(self.run, force=force)
        meta = Meta(
            run_id=uuid.uuid4().hex,
            model=given.model or "",
            layers=self._blocks.layers(given, "live"),
            sampling="every sequence",
            weights="exact",
            attempts=[Attempt(0, time.time_ns())],
            versions={"python": platform.python_version(), "numpy": np.__version__},
            imported="live: answers of a serving engine",
            steps=str(batching),
            lacks=dict(LACKS),
        )
        try:
            if self.run.exists():
                shutil.rmtree(self.run)
            return RankWriter(self.run, meta, str(self.run))
        except OSError as e:
            raise TraceWriteError(f"cannot write the trace {self.run}: {e}") from e

    # -- taking answers ----------------------------------------------------------------------------

    def add(
        self,
        output: object,
        *,
        tag: str | None = None,
        request: str | None = None,
        prompt_start: int | None = None,
    ) -> int:
        """Take one answer. Returns when it is queued; waits only while the disk is behind.

        Args:
            output: A finished `RequestOutput` (or `CompletionOutput`) of vLLM, a response of its or
                of SGLang's server as a dict or as the openai package's object.
            tag: Of its tokens.
            request: Its id, instead of the answer's own.
            prompt_start: The request's `routed_experts_prompt_start` (vLLM) or
                `routed_experts_start_len` (SGLang): prompt tokens that it asked to leave out.

        Returns:
            How many sequences it had: 0 if it was aborted before it ran, or is not finished yet.

        Raises:
            ImportRefused: It has no routing, or is damaged. It is counted and left out; the trace
                goes on.
            TraceWriteError: The disk refused, now or earlier, or the trace is closed.
        """
        self._check_process()
        try:
            found = self._read(output, f"request {request or self.sequences}", prompt_start)
            if request is not None:
                many = len(found) > 1
                found = [
                    replace(x, request=f"{request}/{i}" if many else request)
                    for i, x in enumerate(found)
                ]
            found = [self._checked(x if tag is None else replace(x, tag=tag)) for x in found]
        except ImportRefused:
            self._refuse()
            raise
        for sequence in found:
            self._hand(sequence)
        return len(found)

    def add_routing(
        self,
        ids_TBK: ArrayLike,
        *,
        request: str | None = None,
        tag: str | None = None,
        prompt_tokens: int | None = None,
        token_ids: ArrayLike | None = None,
        first_position: int = 0,
    ) -> None:
        """Take the routing of one sequence as an array.

        Args:
            ids_TBK: Logical expert ids of the tokens that ran, a row for every decoder block.
            request: Its id.
            tag: Of its tokens.
            prompt_tokens: How many of the tokens, from the first on, are prompt; None: not known.
            token_ids: `[T]` vocabulary ids; kept only if the trace keeps them.
            first_position: Position of the first token.

        Raises:
            ImportRefused, TraceWriteError: As `add`.
        """
        self._check_process()
        where = f"request {request or self.sequences}"
        try:
            made = Sequence(
                where=where,
                ids_TLK=self._blocks.take(vllm.decoded(ids_TBK, where), where),
                first_position=first_position,
                prompt_tokens=prompt_tokens,
                token_id_T=None if token_ids is None else vllm.token_ids(token_ids, where),
                request=request,
                tag=tag,
            )
            made = self._checked(made)
        except ImportRefused:
            self._refuse()
            raise
        self._hand(made)

    def follow(self, outputs: Iterable[Output], *, tag: str | None = None) -> Iterator[Output]:
        """Pass answers on, and take each on the way.

        One that is refused is passed on as well, with a warning (`RuntimeWarning`).

        Raises:
            TraceWriteError: As `add`; behind the answer that could not be written.
        """
        for output in outputs:
            failed = None
            try:
                self.add(output, tag=tag)
            except ImportRefused as e:
                warnings.warn(f"not in the trace: {e}", RuntimeWarning, stacklevel=2)
            except TraceWriteError as e:
                failed = e
            yield output
            if failed is not None:
                raise failed

    def flush(self) -> None:
        """Return when all answers before would survive `kill -9`, and readers see them.

        Raises:
            TraceWriteError: The disk refused, now or earlier, or the trace is closed.
        """
        self._check_process()
        request = _Flush()
        self._hand(request)
        request.done.wait()
        if self._failed is not None:
            raise self._failed

    def close(self, error: BaseException | None = None) -> None:
        """Write all, seal the trace. Again, or in a forked child: does nothing.

        Args:
            error: What ended the serving.

        Raises:
            TraceWriteError: The disk refused, now or earlier.
            ImportRefused: A layer was never filled.
        """
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self._closed:
                return
            self._closed = self._closing = True
            self._changed.notify_all()
        atexit.unregister(self.close)
        self._thread.join()
        self._writer.close(error or self._failed)
        if self._failed is not None:
            raise self._failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)

    def _check_process(self) -> None:
        """Refuse a forked child: the thread that writes is not in it."""
        if os.getpid() != self._pid:
            raise TraceWriteError(
                f"the live trace {self.run} is written by process {self._pid}, of which this one "
                "was forked: open another one here."
            )

    # -- one answer --------------------------------------------------------------------------------

    def _read(self, output: object, where: str, prompt_start: int | None) -> list[Sequence]:
        said: Any = output
        if not isinstance(output, Mapping):
            said = vllm.as_answer(output)
            if said is None and hasattr(output, "model_dump"):
                said = output.model_dump()
        if not isinstance(said, Mapping):
            raise ImportRefused(
                f"{where}: a {type(output).__name__} is no answer of vLLM or SGLang: give an array "
                "to add_routing."
            )
        if said.get("finished") is False:
            return []
        if vllm.is_answer(said):
            return vllm.sequences(said, self._blocks, where, prompt_start=prompt_start)
        if _is_sglang(said):
            given = replace(self._given, first_position=prompt_start)
            return [sequence_of(x, given, self.run) for x in responses_of(said, where, self.run)]
        raise ImportRefused(f"{where}: no routing in it: {vllm.SERVED}")

    def _checked(self, sequence: Sequence) -> Sequence:
        """A sequence that the writer will take, in arrays of its own."""
        where = sequence.where
        check_sequence(sequence, len(self._numbers))
        ids_LTK = as_ids(np.moveaxis(sequence.ids_TLK, 1, 0), where)
        check_ids(ids_LTK, self._blocks.experts, dynamic=False, layers=self._numbers, where=where)
        return replace(
            sequence,
            ids_TLK=sequence.ids_TLK.astype(self._ids_type),
            token_id_T=sequence.token_id_T if self._token_ids else None,
        )

    def _refuse(self) -> None:
        def count(meta: Meta) -> None:
            meta.warnings[REFUSED] = meta.warnings.get(REFUSED, 0) + 1

        with self._changed:
            self.refused += 1
            if not self._closed:
                self._writer.edit(count)

    # -- writing -----------------------------------------------------------------------------------

    def _hand(self, item: Sequence | _Flush) -> None:
        size = item.ids_TLK.nbytes if isinstance(item, Sequence) else 0
        with self._changed:
            self._changed.wait_for(
                lambda: not self._bytes or self._bytes + size <= QUEUE_BYTES or self._ending
            )
            if self._failed is not None:
                raise self._failed
            if self._closing:
                raise TraceWriteError(f"the live trace {self.run} is closed.")
            self._items.append(item)
            self._bytes += size
            if isinstance(item, Sequence):
                self.sequences += 1
                self.tokens += len(item.ids_TLK)
            self._changed.notify_all()

    @property
    def _ending(self) -> bool:
        return self._closing or self._failed is not None

    def _work(self) -> None:
        batch: list[Sequence | _Flush] = []
        try:
            due = time.monotonic() + self._flush_seconds
            ending = False
            while not ending:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._items or self._closing, timeout=due - time.monotonic()
                    )
                    batch = list(self._items)
                    self._items.clear()
                    ending = self._closing
                for item in batch:
                    self._take(item)
                with self._changed:
                    self._bytes -= sum(x.ids_TLK.nbytes for x in batch if isinstance(x, Sequence))
                    self._changed.notify_all()
                if ending or time.monotonic() >= due:
                    self._flush()
                    due = time.monotonic() + self._flush_seconds
        except Exception as e:  # whatever it is, those who add must hear of it
            self._fail(e, batch)

    def _take(self, item: Sequence | _Flush) -> None:
        if isinstance(item, _Flush):
            self._flush()
            item.done.set()
            return
        for made in self._batcher.add(item):
            self._writer.put(made)

    def _flush(self) -> None:
        for made in self._batcher.rest():
            self._writer.put(made)
        self._writer.flush()

    def _fail(self, e: Exception, batch: list[Sequence | _Flush]) -> None:
        with self._changed:
            self._failed = e
            left = [*batch, *self._items]
            self._items.clear()
            self._changed.notify_all()
        for item in left:
            if isinstance(item, _Flush):
                item.done.set()


def _is_sglang(said: Mapping[str, Any]) -> bool:
    choices = said.get("choices")
    inside = choices if isinstance(choices, list) else []
    found = (x for x in [said, *inside] if isinstance(x, Mapping))
    return "sglext" in said or any("meta_info" in x for x in found)

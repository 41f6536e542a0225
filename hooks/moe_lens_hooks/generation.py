"""What a model's own `generate` is doing while its forwards run: transformers' decoding loops.

A forward alone does not tell whether it is part of a generation, goes on with rows of the one
before (without a cache), or which beams were returned in the end; the loops do. They are listened
to on the class, by name; a model without them is taken as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_lens_hooks.lineage import Rows
from moe_lens_hooks.wrapping import listen, silence


@dataclass(eq=False)
class Generation:
    """One call of a decoding loop.

    Attributes:
        owner: The model that generates.
        loop: The method's name.
        expand: Rows for each of the user's (beams, or returned sequences).
        returned: How many hypotheses of each are returned.
        cached: A cache is used.
        draft: It drafts tokens for another generation of the same model.
        prefilling: The prompt is being read, maybe in chunks.
        rows: The rows that its forwards go on with; None before the first.
        first: Forwards of `rows` before this generation.
        prompt: Index in `rows.forwards` of the one that ended the prompt.
        began: A forward of it has begun.
        skipped: Positions, as far as they are known, that went before `rows` and were not recorded.
        finished: Of beams that are done, the row that each token was chosen from,
            `[B, beams, new]`; -1 where there is none.
    """

    owner: object
    loop: str
    expand: int
    returned: int
    cached: bool
    draft: bool
    prefilling: bool = False
    rows: Rows | None = None
    first: int = 0
    prompt: int = 0
    began: bool = False
    skipped: int = 0
    finished: Tensor | None = None

    @property
    def beams(self) -> bool:
        return self.loop == "_beam_search"

    def kept(self) -> set[int]:
        """The nodes of `rows` that are in what beam search returned."""
        assert self.rows is not None
        assert self.finished is not None
        kept: set[int] = set()
        for chains in self.finished[:, : self.returned].tolist():
            for chain in chains:
                chosen = [row for row in chain if row >= 0]
                if chosen:
                    kept.update(self.rows.path(self.prompt + len(chosen) - 1, chosen[-1]))
        return kept


class Generations:
    """Those that are running, of these models.

    Args:
        models: The recorded root modules.
        over: Takes a generation that has ended.
    """

    def __init__(self, models: Sequence[nn.Module], over: Callable[[Generation], None]) -> None:
        self._models = list(models)
        self._over = over
        self._running: list[Generation] = []
        self._listeners = {
            "_sample": self._sample,
            "_beam_search": self._beam_search,
            "_assisted_decoding": self._assisted_decoding,
            "_prefill": self._prefill,
            "_update_finished_beams": self._finished,
        }
        for cls in {type(m) for model in models for m in model.modules()}:
            if hasattr(cls, "generate"):
                for name, listener in self._listeners.items():
                    listen(cls, name, listener)

    def close(self) -> None:
        """Stop listening."""
        for listener in self._listeners.values():
            silence(listener)

    @property
    def current(self) -> Generation | None:
        """The innermost one."""
        return self._running[-1] if self._running else None

    @property
    def whole(self) -> bool:
        """A beam search is under way: only from all its forwards is it known what it returns."""
        return any(g.beams and g.began for g in self._running)

    def _ours(self, model: object) -> bool:
        return any(m is model for root in self._models for m in root.modules())

    def _of(self, model: object) -> Generation | None:
        """The generation that is running, if it is this model's."""
        return self.current if self.current is not None and self.current.owner is model else None

    @contextmanager
    def _loop(self, loop: str, model: Any, kwargs: dict[str, Any]) -> Iterator[list[Any]]:
        """One call of a decoding loop."""
        if not self._ours(model):
            yield []
            return
        config = kwargs.get("generation_config")
        counts = ("num_beams", "num_return_sequences")
        beams, returned = (getattr(config, name, None) or 1 for name in counts)
        generation = Generation(
            owner=model,
            loop=loop,
            expand=max(beams, returned),
            returned=returned,
            cached=bool(kwargs.get("use_cache", True)),
            draft=bool(getattr(config, "is_assistant", False)) and bool(self._running),
        )
        self._running.append(generation)
        try:
            yield []
        finally:
            self._running.remove(generation)
        self._over(generation)

    def _sample(self, model: Any, args: Any, kwargs: Any) -> AbstractContextManager[list[Any]]:
        return self._loop("_sample", model, kwargs)

    def _beam_search(self, model: Any, args: Any, kwargs: Any) -> AbstractContextManager[list[Any]]:
        return self._loop("_beam_search", model, kwargs)

    def _assisted_decoding(
        self, model: Any, args: Any, kwargs: Any
    ) -> AbstractContextManager[list[Any]]:
        return self._loop("_assisted_decoding", model, kwargs)

    @contextmanager
    def _prefill(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[list[Any]]:
        generation = self._of(model)
        if generation is None:
            yield []
            return
        generation.prefilling = True
        try:
            yield []
        finally:
            generation.prefilling = False
            if generation.rows is not None:
                generation.prompt = len(generation.rows.forwards) - 1

    @contextmanager
    def _finished(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[list[Any]]:
        box: list[Any] = []
        yield box
        generation = self._of(model)
        if generation is not None and box and isinstance(box[0], tuple) and len(box[0]) == 4:
            generation.finished = box[0][2]

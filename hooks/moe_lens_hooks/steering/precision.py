"""`precision`: what rounding the weights of routers and experts does to a model; into a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from moe_lens.errors import SteeringError, UnsupportedRouter
from moe_lens.trace.measured import Result, result_path
from moe_lens.trace.precision import PRECISION, Precision
from moe_lens.trace.reader import open_run
from moe_lens_hooks.adapter import Adapter
from moe_lens_hooks.steering.change import Base
from moe_lens_hooks.steering.counterfactual import Progress, measure_all
from moe_lens_hooks.steering.fake_quant import format_of
from moe_lens_hooks.steering.interventions import TOKENS_AT_ONCE, Interventions, intervene
from moe_lens_hooks.steering.matching import match, warn_of_another_class
from moe_lens_hooks.steering.matrices import weights_of
from moe_lens_hooks.steering.rounding import PARTS, Part, RoundedLayer, Rounding
from moe_lens_hooks.steering.token_losses import Batch, Loss, next_token_loss

TOKENS = 4096
FORMATS = ("int8", "int4", "fp8")


def precision(
    model: nn.Module,
    batches: Iterable[Batch],
    run: str | Path,
    *,
    loss: Loss = next_token_loss,
    formats: Sequence[str] = FORMATS,
    parts: Sequence[Part] = PARTS,
    layers: Sequence[int] | None = None,
    tokens: int = TOKENS,
    name: str = "precision",
    tokens_at_once: int = TOKENS_AT_ONCE,
    adapters: Sequence[Adapter] = (),
    on_progress: Progress | None = None,
) -> Precision:
    """Round the weights of routers and experts to low precision, and see what routing and loss do.

    For each format and part: each layer alone, what comes before it as it was; all layers at once,
    routing by themselves; and all at once, each given the experts that it chose before. So the
    error of arithmetic is told from that of routing. Activations, biases, shared experts and all
    other weights stay as they are.

    The model's own tensors are never written to; one layer's rounded weights are held at a time.

    Args:
        model: The model that was recorded, or a copy of it, with plain floating-point weights.
        batches: As `Interventions.measure` takes them.
        run: Folder of its trace. The result is written into it, and replaces one of that name.
        loss: As in `intervene`.
        formats: `int8`, `int4`, … `int2`, `fp8` (e4m3). A scale for each output of a matrix; of
            integers below 8 bits one for each 128 of its inputs. `int4:32`: for each 32.
        parts: Whose weights: router, experts, both.
        layers: Numbers in call order; None: all whose weights are found.
        tokens: Whole sequences are taken until these are so many.
        name: Of the result.
        tokens_at_once: As in `intervene`; the routers' logits of so many tokens are held.
        adapters: As in `intervene`.
        on_progress: Called before each part.

    Raises:
        NoMoELayers, UnsupportedRouter: As `intervene` and `measure`; or the weights of a layer are
            not to be told, quantised already, or not those that it computes with.
        SteeringError: The model is not the one that was recorded, or nothing can be measured.
        TraceError: `run` is no trace.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    if bad := [p for p in parts if p not in PARTS]:
        raise SteeringError(f"part {bad[0]!r} is none of {', '.join(PARTS)}.")
    wanted = [format_of(x) for x in dict.fromkeys(formats)]
    asked = [p for p in PARTS if p in parts]
    if not wanted or not asked:
        raise SteeringError("there is nothing to round: name a format and a part.")
    path = result_path(Path(run), PRECISION, name)
    meta = open_run(run).meta
    session = intervene(model, loss=loss, tokens_at_once=tokens_at_once, adapters=adapters)
    match(meta, str(run), session.passes.layers)
    warn_of_another_class(meta, str(run), model)
    about: dict[str, Any] = {"model": type(model).__name__, "formats": [f.name for f in wanted]}
    about |= {"parts": asked, "tokens": tokens, "tokens_at_once": tokens_at_once}
    with Result(path, about, PRECISION) as result:
        bases = measure_all(session, batches, tokens)
        found, about["refused"] = _found(session, bases[0], asked, layers)
        about["moe_layers"] = [asdict(bases[0].layers[n].info) for n in found]
        about["sequences"] = sum(len(b.tags_B) for b in bases)
        about["measured_tokens"] = sum(int(b.tokens.sum()) for b in bases)
        rounding = Rounding(model, session.passes, found, wanted, asked)
        of = rounding.parts_of(bases)
        for done, (says, measure) in enumerate(rounding.parts(bases)):
            if on_progress is not None:
                on_progress(done, of, says)
            result.add(measure())
        if on_progress is not None:
            on_progress(of, of, "")
    return Precision(result.path, about, result.interrupted)


def _found(
    session: Interventions, base: Base, parts: Sequence[Part], layers: Sequence[int] | None
) -> tuple[dict[int, RoundedLayer], dict[str, str]]:
    """The layers to round, by number; and why others are left out, by their paths.

    Raises:
        SteeringError, UnsupportedRouter: One that was asked for cannot be; or none can.
    """
    if bad := [n for n in layers or () if not 0 <= n < len(base.layers)]:
        raise SteeringError(f"there is no layer {bad[0]}: the model has {len(base.layers)}.")
    by_path = {x.info.path: x for x in session.passes.layers}
    found: dict[int, RoundedLayer] = {}
    refused: dict[str, str] = {}
    for n in range(len(base.layers)) if layers is None else sorted(set(layers)):
        layer = base.layers[n]
        mine = by_path[layer.info.path]
        try:
            if not layer.aligned:
                raise UnsupportedRouter(
                    f"layer {n} ({layer.info.path}) does not route the tokens that have losses."
                )
            router = weights_of(mine, "router") if parts != ["experts"] else []
            experts = weights_of(mine, "experts") if parts != ["router"] else []
            found[n] = RoundedLayer(router, experts)
        except UnsupportedRouter as e:
            if layers is not None:
                raise
            refused[layer.info.path] = str(e)
    if not found:
        raise UnsupportedRouter(next(iter(refused.values())))
    return found, refused

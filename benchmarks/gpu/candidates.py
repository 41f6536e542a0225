"""Who races: our layer on each of its backends, transformers' experts, and the bare products.

Whoever cannot be had here is listed with the reason, never an error.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from shapes import Case
from torch import Tensor, nn

from moe_lens.runtime import ops
from moe_lens.runtime.layer import MoELayer
from moe_lens.runtime.weights import free_bytes

Weights = tuple[Tensor, Tensor]
Work = Callable[[], Any]

OURS = {
    "ours auto": "auto",
    "ours grouped_mm": "cuda+grouped_mm",
    "ours triton": "cuda+triton",
}
GROUPED, BATCHED, EAGER = "tf grouped_mm", "tf batched_mm", "tf eager"
COMPILED, BARE = "tf compiled", "bare grouped_mm x2"
THEIRS = {GROUPED: "grouped_mm", BATCHED: "batched_mm", EAGER: "eager"}
NAMES = (*OURS, *THEIRS, COMPILED, BARE)

CLOSE, CLOSE_FOR_OTHERS = 5e-3, 2e-2
"""Relative L2 distance from float64. Others round more often; for them it is only no nonsense."""

_MODULES = {
    "olmoe": "olmoe.modeling_olmoe",
    "qwen3": "qwen3_moe.modeling_qwen3_moe",
    "mixtral": "mixtral.modeling_mixtral",
    "deepseek": "deepseek_v3.modeling_deepseek_v3",
}


class NotHere(Exception):
    """Why a candidate cannot run."""


@dataclass
class Candidate:
    """One that races, or the reason why not.

    Attributes:
        work: Runs it once; None: it is not available.
        why: Of ours, why this backend; of what is not available, why not.
        whole: It computes the whole layer; without it, only a part, as an upper bound.
        dropped: Runs it with other ids, some of them -1.
    """

    name: str
    work: Work | None
    why: str = ""
    whole: bool = True
    dropped: Callable[[Tensor], Tensor] | None = None

    @property
    def ours(self) -> bool:
        return self.name in OURS

    @property
    def limit(self) -> float:
        return CLOSE if self.ours else CLOSE_FOR_OTHERS


def candidates(case: Case, weights: Weights, names: list[str]) -> list[Candidate]:
    """The named ones, for this case."""
    found = []
    for name in names:
        try:
            found.append(_build(name, case, weights))
        except Exception as e:  # whatever a library of another version comes up with
            found.append(Candidate(name, None, reason(e)))
    return found


def reason(error: BaseException) -> str:
    """The first line of what went wrong, short enough for a table's foot."""
    lines = str(error).strip().splitlines() or [""]
    name = "" if isinstance(error, NotHere) else f"{type(error).__name__}: "
    return f"{name}{lines[0]}"[:300]


def _build(name: str, case: Case, weights: Weights) -> Candidate:
    if name in OURS:
        return _ours(name, case, weights)
    if name == BARE:
        return Candidate(name, _bare(case, weights), whole=False)
    on_cuda = case.x_TD.is_cuda
    if name == BATCHED:
        _check_batched(case)
    if name == COMPILED and not on_cuda:
        raise NotHere("needs CUDA: on a CPU there is nothing to tune")
    module = experts(case, weights, THEIRS.get(name, "grouped_mm"))
    call: Any = module
    if name == COMPILED:
        call = torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False)

    def work() -> Any:
        with torch.no_grad():
            return call(case.x_TD, case.long_ids_TK, case.weights_TK)

    return Candidate(name, work, type(module).__name__)


def _ours(name: str, case: Case, weights: Weights) -> Candidate:
    layer = MoELayer(*weights, backend=OURS[name])
    layer.expect(case.rows_E)
    backend = layer.backend_for(case.ids_TK.numel())

    def dropped(ids_TK: Tensor) -> Tensor:
        return layer(case.x_TD, ids_TK, case.weights_TK)

    return Candidate(
        name, lambda: dropped(case.ids_TK), f"{backend.name}: {backend.why}", dropped=dropped
    )


def _bare(case: Case, weights: Weights) -> Work:
    """Both products on rows that lie ready, and nothing else: what no layer around it can beat."""
    if not case.x_TD.is_cuda:
        raise NotHere("needs CUDA: on a CPU it is a loop")
    if not hasattr(nn.functional, "grouped_mm"):
        raise NotHere(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    gate_up, down = weights
    plan = ops.plan(case.ids_TK, case.shape.experts, reference=True)
    x_SD = ops.permute(case.x_TD, plan, reference=True)
    h_SF = torch.randn(len(x_SD), case.shape.intermediate, device=x_SD.device).to(x_SD.dtype)

    def work() -> Any:
        with torch.no_grad():
            first = nn.functional.grouped_mm(x_SD, gate_up.transpose(1, 2), offs=plan.ends_E)
            second = nn.functional.grouped_mm(h_SF, down.transpose(1, 2), offs=plan.ends_E)
        return first, second

    return work


def _check_batched(case: Case) -> None:
    """It copies its expert's weights for every slot."""
    if case.phase != "decode":
        raise NotHere("decode only: it copies an expert's weights for every slot")
    shape, slots = case.shape, case.ids_TK.numel()
    needed = 3 * slots * shape.hidden * shape.intermediate * case.x_TD.element_size()
    free = free_bytes(case.x_TD.device)
    # Twice: what warms up and what is captured have memory of their own.
    if free is not None and 2.2 * needed > free:
        raise NotHere(f"needs 2 x {needed / 1e9:.0f} GB of copies, and {free / 1e9:.0f} are free")


class _Config:
    """The attributes that the experts' constructors of all four models read."""

    def __init__(self, case: Case, implementation: str) -> None:
        shape = case.shape
        self.num_experts = self.num_local_experts = self.n_routed_experts = shape.experts
        self.num_experts_per_tok = shape.top_k
        self.hidden_size = shape.hidden
        self.intermediate_size = self.moe_intermediate_size = shape.intermediate
        self.hidden_act = "silu"
        self._experts_implementation = implementation


def experts(case: Case, weights: Weights, implementation: str) -> nn.Module:
    """The model's experts of the installed transformers, around our weights (not copied).

    Raises:
        NotHere: There is no such class, or it is laid out in another way.
    """
    if implementation != "eager":
        from transformers.integrations import moe

        if implementation not in moe.ALL_EXPERTS_FUNCTIONS:
            raise NotHere(f"this transformers has no experts implementation {implementation}")
    path = f"transformers.models.{_MODULES.get(case.shape.name, _MODULES['qwen3'])}"
    source = importlib.import_module(path)
    classes = [
        cls
        for name, cls in inspect.getmembers(source, inspect.isclass)
        if issubclass(cls, nn.Module)
        and cls.__module__ == path
        and name.endswith(("Experts", "NaiveMoe"))
    ]
    if not classes:
        raise NotHere(f"{path} has no experts module")
    with torch.device("meta"):
        module = classes[0](_Config(case, implementation))
    for name, weight in zip(("gate_up_proj", "down_proj"), weights, strict=True):
        there = getattr(module, name, None)
        if there is None or there.shape != weight.shape:
            layout = None if there is None else list(there.shape)
            raise NotHere(f"{classes[0].__name__}.{name} is {layout}, not {list(weight.shape)}")
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return module.eval()

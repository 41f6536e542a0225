"""What a replay is asked to do, and what it makes of a trace that does not say everything."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moe_lens.errors import ReplayError
from moe_lens.replay.floors import Shape
from moe_lens.replay.policies import Policy
from moe_lens.replay.presets import Preset
from moe_lens.runtime import cpu
from moe_lens.runtime.layer import MoELayer
from moe_lens.runtime.weights import free_bytes
from moe_lens.trace.meta import LayerInfo

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_WORKS = 4
"""The routing, itself once more, and two twins: each has buffers of its own."""


@dataclass(frozen=True)
class Settings:
    """How to replay.

    Attributes:
        policy: What becomes of the router's choices.
        hidden: Of every layer; None: of the preset, or as the trace says.
        intermediate: The same, of an expert.
        preset: A published model whose sizes are taken.
        dtype: One of `DTYPES`; None: bfloat16 on a GPU, what the processor is quick with on a CPU.
        device: As torch names it; None: the first CUDA device, or the CPU where there is none.
        backend: Of the layer: auto, or one of `moe_lens.runtime.backend.NAMES`.
        forwards: Of each phase, at most; None: all.
        partial: Replay forwards too of which only some tokens have rows.
        layers: Only these.
        phase: Only this one.
        steps: Only these.
        repeats: Times that each forward is measured.
        seconds: Begin no forward that would end after this time; None: take as long as it takes.
            Of the first forward of each phase, begin no layer after it.
        stages: Measure the stages of the layer too.
        curve: Measure what one expert takes for 1, 2, 4, … rows, and attribute time to experts.
        seed: Of weights and inputs.
    """

    policy: Policy = field(default_factory=Policy)
    hidden: int | None = None
    intermediate: int | None = None
    preset: Preset | None = None
    dtype: str | None = None
    device: str | None = None
    backend: str = "auto"
    forwards: int | None = 24
    partial: bool = False
    layers: frozenset[int] | None = None
    phase: str | None = None
    steps: range | None = None
    repeats: int = 5
    seconds: float | None = None
    stages: bool = False
    curve: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.forwards is not None and self.forwards < 1:
            raise ReplayError(f"forwards is 1 or more, or None for all; got {self.forwards}.")
        if self.repeats < 2:
            raise ReplayError(f"repeats is 2 or more, so that noise shows; got {self.repeats}.")
        if self.preset is not None and not isinstance(self.preset, Preset):
            raise ReplayError(
                f"preset is a Preset, got {self.preset!r}: moe_lens.replay.presets.preset(name)."
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", frozenset(self.layers))


def device_of(settings: Settings) -> torch.device:
    """The device that is asked for, or the best there is.

    Raises:
        ReplayError: It is not there.
    """
    if settings.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(settings.device)
    except RuntimeError as e:
        raise ReplayError(f"{settings.device!r} is no device: take cpu, cuda or cuda:1.") from e
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ReplayError(
                f"There is no device {settings.device}: torch sees {count} CUDA devices here. "
                "--device cpu replays on the CPU."
            )
    elif device.type != "cpu":
        raise ReplayError(f"Replay runs on cpu and cuda, not on {settings.device}.")
    return device


def dtype_of(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype that is asked for, or the one that the device is quick with.

    Raises:
        ReplayError: None of `DTYPES`.
    """
    if settings.dtype is None:
        return torch.bfloat16 if device.type == "cuda" else cpu.best_dtype()
    if settings.dtype not in DTYPES:
        raise ReplayError(f"dtype is {settings.dtype!r}: it is one of {', '.join(DTYPES)}.")
    return DTYPES[settings.dtype]


def shape_of(info: LayerInfo, settings: Settings, dtype: torch.dtype) -> Shape:
    """The shape of a layer: its experts are the trace's, its sizes those that are asked for.

    Raises:
        ReplayError: Nobody says how wide it is.
    """
    preset = settings.preset
    hidden = settings.hidden or (preset.hidden if preset else info.hidden_size)
    inner = settings.intermediate or (preset.intermediate if preset else info.intermediate_size)
    if hidden is None or inner is None:
        missing = " and ".join(
            n for n, v in (("--hidden", hidden), ("--intermediate", inner)) if v is None
        )
        path = "" if info.path == str(info.layer) else f" ({info.path})"
        raise ReplayError(
            f"The trace does not say how large an expert of layer {info.layer}{path} is, since its "
            f"recorder did not know. Give {missing}, or --preset."
        )
    if hidden < 1 or inner < 1:
        raise ReplayError(f"hidden and intermediate are at least 1, got {hidden} and {inner}.")
    return Shape(info.experts, hidden, inner, str(dtype).removeprefix("torch."), dtype.itemsize)


def check_memory(
    shape: Shape, dtype: torch.dtype, tokens: int, top_k: int, device: torch.device
) -> None:
    """Refuse a layer that the device has no room for, before anything is allocated.

    Args:
        shape: Of the layer.
        dtype: Of its weights and rows.
        tokens: Of the largest forward.
        top_k: Slots of a token.
        device: Where it is to run.

    Raises:
        ReplayError: With what it takes and what there is.
    """
    weights = MoELayer.bytes(shape.experts, shape.hidden, shape.intermediate, dtype)
    rows = tokens * top_k
    widths = 2 * shape.hidden * (tokens + rows) + 3 * shape.intermediate * rows
    batch = _WORKS * widths * shape.itemsize
    free = free_bytes(device)
    if free is not None and weights + batch > free:
        raise ReplayError(
            f"One layer of {shape.experts} experts of {shape.hidden} x {shape.intermediate} in "
            f"{shape.dtype} takes {_gb(weights)}, and a forward of {tokens:,} tokens, top-{top_k}, "
            f"{_gb(batch)} beside it; {device} has {_gb(free)} free. Nothing was allocated. Take a "
            "smaller --hidden and --intermediate, a smaller --dtype, or forwards with fewer tokens "
            "(--phase, --steps)."
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"

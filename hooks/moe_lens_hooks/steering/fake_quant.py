"""Weights rounded to what a low-precision format can hold, kept in their own type.

Symmetric, to nearest (ties to even), a scale in float32 (float64 for such weights): one for each
output of a matrix, or for each group of its inputs. torchao computes the same numbers from the same
settings; it is not needed.

Legend: O outputs, I inputs of a matrix, G groups of S inputs that share a scale.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lens.errors import SteeringError

GROUP = 128
"""Inputs that share a scale below 8 bits, where a format does not say: as GPTQ and AWQ have it."""
_E4M3_MOST = 448.0


@dataclass(frozen=True)
class Format:
    """A format: its name, bits of an integer (None: float8 e4m3), inputs that share a scale.

    `group` None: all inputs of an output.
    """

    name: str
    bits: int | None
    group: int | None

    def rounded(self, matrix_OI: Tensor) -> Tensor:
        """What the format makes of a matrix, in the matrix's type.

        Raises:
            SteeringError: The matrix holds NaN or infinity.
        """
        inputs = matrix_OI.shape[1]
        size = inputs if self.group is None else min(self.group, inputs)
        kind = torch.promote_types(matrix_OI.dtype, torch.float32)
        # The last group may be short: zeros change neither its largest weight nor any other.
        padded = torch.nn.functional.pad(matrix_OI.to(kind), (0, -inputs % size))
        w_OGS = padded.view(len(matrix_OI), -1, size)
        most_OG1 = w_OGS.abs().amax(-1, keepdim=True)
        if not bool(most_OG1.isfinite().all()):
            raise SteeringError("a weight is NaN or infinite: no scale fits it.")
        top = _E4M3_MOST if self.bits is None else float(2 ** (self.bits - 1) - 1)
        scale_OG1 = (most_OG1 / top).clamp_min(torch.finfo(kind).smallest_normal)
        steps_OGS = (w_OGS / scale_OG1).clamp(-top, top)
        if self.bits is None:
            steps_OGS = steps_OGS.to(torch.float8_e4m3fn).to(kind)
        else:
            steps_OGS = steps_OGS.round()
        rounded = (steps_OGS * scale_OG1).view(len(matrix_OI), -1)
        return rounded[:, :inputs].to(matrix_OI.dtype)


def format_of(name: str) -> Format:
    """The format of this name: `int8`, `int4`, … down to `int2`, `fp8`; `int4:32` groups by 32.

    Raises:
        SteeringError: It is none.
    """
    match = re.fullmatch(r"(?:int([2-8])|fp8)(?::([1-9]\d*))?", name)
    if match is None:
        raise SteeringError(
            f"format {name!r} is none of fp8, int8, int4, … int2, nor one of these with the number "
            "of inputs that share a scale, as int4:32."
        )
    bits = int(match[1]) if match[1] else None
    by_output = None if bits in (None, 8) else GROUP
    return Format(name, bits, int(match[2]) if match[2] else by_output)

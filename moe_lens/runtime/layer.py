"""An MoE layer that runs a given routing: weights, a backend, and the ops in their order.

The router is not part of it: expert ids and gate weights come from a trace, or from a model.
Inference only. T tokens, K top-k, E experts, D hidden, F an expert's intermediate size,
S = T * K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime import checks, gemm, ops, reference
from moe_lens.runtime.backend import Backend, Shape, resolve
from moe_lens.runtime.gemm import grouped, loop, tiles
from moe_lens.runtime.plan import Plan
from moe_lens.runtime.weights import check_weights, random_weights, weight_bytes, weights_of


class MoELayer:
    """silu(x @ gate.T) * (x @ up.T) @ down.T for each token's experts, summed by gate weight.

    Args:
        gate_up_E2FD: Weights [E, 2F, D], gate before up. Not copied.
        down_EDF: Weights [E, D, F], of the same dtype on the same device. Not copied.
        backend: "auto", or the name of one (`backend.NAMES`). "auto" can be replaced by the
            environment variable MOE_LENS_RUNTIME.

    Attributes:
        experts: E.
        hidden: D.
        intermediate: F.
        dtype: Of weights, inputs and outputs.
        device: Where all of them are.

    Raises:
        RuntimeInputError: The weights do not fit together, or the backend does not run here.
    """

    def __init__(self, gate_up_E2FD: Tensor, down_EDF: Tensor, *, backend: str = "auto") -> None:
        check_weights(gate_up_E2FD, down_EDF)
        self._gate_up = gate_up_E2FD.detach().contiguous()
        self._down = down_EDF.detach().contiguous()
        self.experts, self.hidden, self.intermediate = down_EDF.shape
        self.dtype, self.device = down_EDF.dtype, down_EDF.device
        sizes = self.experts, self.hidden, self.intermediate
        aligned = grouped.is_aligned(self._gate_up, self._down)
        self._shape = Shape(self.device, self.dtype, *sizes, aligned)
        self._wish = backend
        self._block: int | None = None
        # Splitting weights into matrices takes longer than a small product: done once, here.
        self._gate_ups: Sequence[Tensor] = self._gate_up.unbind(0)
        self._downs: Sequence[Tensor] = self._down.unbind(0)
        self._backends: dict[int | None, Backend] = {None: resolve(backend, self._shape)}

    @classmethod
    def from_experts(cls, module: Any, *, backend: str = "auto") -> MoELayer:
        """The layer of an experts module of transformers: its own weights, not copied.

        Raises:
            RuntimeInputError: The module has biases, another activation or another layout.
        """
        return cls(*weights_of(module), backend=backend)

    @classmethod
    def random(
        cls,
        experts: int,
        hidden: int,
        intermediate: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int,
        backend: str = "auto",
    ) -> MoELayer:
        """A layer of this shape with normally distributed weights, the same for the same seed.

        Standard normal inputs give outputs of root mean square 1 an expert.

        Raises:
            RuntimeInputError: It needs more memory than the device has free.
        """
        weights = random_weights(
            experts, hidden, intermediate, dtype=dtype, device=torch.device(device), seed=seed
        )
        return cls(*weights, backend=backend)

    @staticmethod
    def bytes(experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> int:
        """What the weights of such a layer take."""
        return weight_bytes(experts, hidden, intermediate, dtype)

    @property
    def backend(self) -> Backend:
        """What runs a large batch, and why."""
        return self._backends[None]

    def backend_for(self, slots: int) -> Backend:
        """What runs a batch of `slots` = T * K slots, and why."""
        if slots not in self._backends:
            self._backends[slots] = resolve(self._wish, self._shape, slots)
        return self._backends[slots]

    def forced(self, backend: str) -> MoELayer:
        """A layer of the same weights that another backend runs, whatever the batch."""
        return MoELayer(self._gate_up, self._down, backend=backend)

    def expect(self, rows_E: Iterable[int]) -> None:
        """Choose the tiles of the Triton kernel for experts with these rows, as recorded.

        Without it they are chosen as if every expert had equally many.
        """
        self._block = tiles.block_rows(rows_E)

    def __call__(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Run the layer.

        Args:
            x_TD: Tokens, of the layer's dtype on its device.
            expert_ids_TK: int32; -1: no expert runs for this slot. `checks.check_ids` says whether
                ids are as a router gives them; here that would make the host wait.
            weights_TK: Gate weights, floating point.

        Returns:
            [T, D]. Slots with id -1 add nothing.

        Raises:
            RuntimeInputError: A shape, dtype or device does not fit.
        """
        self._check(x_TD, expert_ids_TK, weights_TK)
        if not len(x_TD):
            return x_TD.new_empty(0, self.hidden)
        with torch.inference_mode():
            backend = self.backend_for(expert_ids_TK.numel())
            if backend.name == "reference":
                return reference.moe(x_TD, expert_ids_TK, weights_TK, self._gate_up, self._down)
            plan = ops.plan(expert_ids_TK, self.experts)
            if backend.product == "triton":
                h_SF = self._gate_up_fused(x_TD, plan)
            else:
                gate_up_S2F = self._product(backend, ops.permute(x_TD, plan), plan, down=False)
                h_SF = ops.swiglu(gate_up_S2F, plan.ends_E)
            return ops.combine(self._product(backend, h_SF, plan, down=True), plan, weights_TK)

    def parts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> dict[str, Callable[[], object]]:
        """The stages of one call, to be timed each for itself.

        Each stage works on what the stage before it left, which is computed here, once. A backend
        that gathers and gates inside its products has the stages plan, gate_up, down and combine;
        the others have permute and act beside them.

        Raises:
            RuntimeInputError: As a call, or there are no tokens.
        """
        self._check(x_TD, expert_ids_TK, weights_TK)
        if not len(x_TD):
            raise RuntimeInputError("no tokens: there are no stages to time")
        backend = self.backend_for(expert_ids_TK.numel())
        plain = backend.name == "reference"
        with torch.inference_mode():
            plan = ops.plan(expert_ids_TK, self.experts, reference=plain)
            stages: dict[str, Callable[[], object]] = {
                "plan": lambda: ops.plan(expert_ids_TK, self.experts, reference=plain)
            }
            if backend.product == "triton":
                h_SF = self._gate_up_fused(x_TD, plan)
                stages["gate_up"] = lambda: self._gate_up_fused(x_TD, plan)
            else:
                x_SD = ops.permute(x_TD, plan, reference=plain)
                gate_up_S2F = self._product(backend, x_SD, plan, down=False)
                h_SF = ops.swiglu(gate_up_S2F, plan.ends_E, reference=plain)
                stages["permute"] = lambda: ops.permute(x_TD, plan, reference=plain)
                stages["gate_up"] = lambda: self._product(backend, x_SD, plan, down=False)
                stages["act"] = lambda: ops.swiglu(gate_up_S2F, plan.ends_E, reference=plain)
            y_SD = self._product(backend, h_SF, plan, down=True)
            stages["down"] = lambda: self._product(backend, h_SF, plan, down=True)
            stages["combine"] = lambda: ops.combine(y_SD, plan, weights_TK, reference=plain)
        return {name: torch.inference_mode()(stage) for name, stage in stages.items()}

    def _product(self, backend: Backend, x_SD: Tensor, plan: Plan, *, down: bool) -> Tensor:
        """One grouped product, on rows that are gathered already."""
        w_EFD = self._down if down else self._gate_up
        if backend.name == "reference":
            return reference.grouped_mm(x_SD, w_EFD, plan.ends_E)
        if backend.name == "cpu" or backend.product == "loop":
            matrices = self._downs if down else self._gate_ups
            return loop.grouped_mm(x_SD, matrices, plan.ends_E)
        if backend.product == "triton":
            from moe_lens.runtime.gemm import triton_kernel

            tile = self._tile(len(x_SD), swiglu=False)
            return triton_kernel.grouped_mm(x_SD, w_EFD, plan.ends_E, tile)
        return gemm.grouped_mm(x_SD, w_EFD, plan.ends_E, backend.product)

    def _gate_up_fused(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Gather, first product and SwiGLU in one kernel."""
        from moe_lens.runtime.gemm import triton_kernel

        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        return triton_kernel.grouped_mm(
            x_TD,
            self._gate_up,
            plan.ends_E,
            self._tile(len(plan.slot_S), swiglu=True),
            slot_S=plan.slot_S,
            top_k=plan.row_TK.shape[1],
            swiglu=True,
        )

    def _tile(self, slots: int, *, swiglu: bool) -> tiles.Tile:
        block = self._block
        if block is None:
            block = tiles.block_rows([-(-slots // self.experts)] * self.experts)
        return tiles.tile_for(block, self.dtype, swiglu=swiglu)

    def _check(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> None:
        checks.check_plan(expert_ids_TK, self.experts)
        tokens = len(expert_ids_TK)
        if x_TD.shape != (tokens, self.hidden) or x_TD.dtype != self.dtype:
            raise RuntimeInputError(
                f"x must be {self.dtype} [{tokens}, {self.hidden}], got {x_TD.dtype} "
                f"{list(x_TD.shape)}"
            )
        if weights_TK.shape != expert_ids_TK.shape or not weights_TK.is_floating_point():
            raise RuntimeInputError(
                f"weights must be floating point {list(expert_ids_TK.shape)}, got "
                f"{weights_TK.dtype} {list(weights_TK.shape)}"
            )
        for name, tensor in (("x", x_TD), ("ids", expert_ids_TK), ("weights", weights_TK)):
            if tensor.device != self.device:
                raise RuntimeInputError(
                    f"{name} are on {tensor.device}, the layer is on {self.device}"
                )

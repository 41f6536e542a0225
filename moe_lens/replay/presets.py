"""Sizes of published models, to ask what a recorded routing would cost there.

`hidden` and `intermediate` are of one routed expert, `layers` counts MoE layers alone. Activations
are taken as SwiGLU, as the runtime computes it; Gemma 4 (GeGLU) and gpt-oss (a clamped SwiGLU with
biases) do as much arithmetic and move as many bytes, but for the biases.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from moe_lens.errors import ReplayError


@dataclass(frozen=True)
class Preset:
    """A published model's MoE layers.

    Attributes:
        source: Where the numbers stand.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    source: str


PRESETS = {
    p.name: p
    for p in (
        Preset(
            "mixtral-8x7b",
            *(4096, 14336, 8, 2, 32),
            "config.json of mistralai/Mixtral-8x7B-v0.1; defaults of transformers' MixtralConfig",
        ),
        Preset(
            "olmoe-1b-7b",
            *(2048, 1024, 64, 8, 16),
            "config.json of allenai/OLMoE-1B-7B-0924 (the default intermediate_size of "
            "transformers' OlmoeConfig is another)",
        ),
        Preset(
            "qwen3-30b-a3b",
            *(2048, 768, 128, 8, 48),
            "config.json of Qwen/Qwen3-30B-A3B; but for the number of layers, defaults of "
            "transformers' Qwen3MoeConfig",
        ),
        Preset(
            "deepseek-v3",
            *(7168, 2048, 256, 8, 58),
            "config.json of deepseek-ai/DeepSeek-V3; defaults of transformers' DeepseekV3Config: "
            "61 layers, the first 3 dense",
        ),
        Preset(
            "gpt-oss-20b",
            *(2880, 2880, 32, 4, 24),
            "config.json of openai/gpt-oss-20b",
        ),
        Preset(
            "gpt-oss-120b",
            *(2880, 2880, 128, 4, 36),
            "config.json of openai/gpt-oss-120b; defaults of transformers' GptOssConfig",
        ),
        Preset(
            "gemma-4-26b-a4b",
            *(2816, 704, 128, 8, 30),
            "text_config in config.json of google/gemma-4-26B-A4B-it",
        ),
    )
}


def preset(name: str) -> Preset:
    """A preset by its name, whatever its case.

    Raises:
        ReplayError: There is none, with the names there are.
    """
    found = PRESETS.get(name.lower())
    if found is None:
        asked = name.lower()
        longer = [known for known in PRESETS if asked and known.startswith(asked)]
        near = longer or difflib.get_close_matches(asked, PRESETS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ReplayError(f"There is no preset {name!r}.{hint} There are: {', '.join(PRESETS)}.")
    return found

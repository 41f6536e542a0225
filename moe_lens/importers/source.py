"""What a format's reader hands to the writer: the contract between `formats/` and `writing`.

A reader opens a file, says what is in it (`Source`), and yields what it holds piece by piece, so
that memory stays flat: forwards as an engine ran them (`Pass`), whole sequences that know nothing
of forwards (`Sequence`), or counts alone (`Counted`). It translates; `checks` and `writing` do the
rest for all formats alike.

T tokens of a pass or sequence, L MoE layers in it, K choices of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace.meta import LayerInfo

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float32]

UNKNOWN_PHASE = "unknown"
"""The phase of tokens of which a format does not say whether they are prompt or generated."""


@dataclass(frozen=True)
class Given:
    """What the user says about files that do not say it themselves. None: nothing.

    Attributes:
        experts: E, routed experts of a layer.
        top_k: K, experts a token chooses.
        dense_blocks: Decoder blocks without experts, where arrays have a row for every block.
        blocks: Decoder blocks of the model.
        model: Name of the model.
        hidden_size, intermediate_size: Of the model, and of one expert.
        score: How logits become probabilities: "softmax" or "sigmoid".
        sequence_length: Tokens of every sequence of a pass, where the file does not tell them
            apart.
        first_position: Position of the first token that responses hold, where they were asked for
            from one on (SGLang's routed_experts_start_len, vLLM's routed_experts_prompt_start).
        pipeline_stages: Pipeline stages of the run, where ranks number their layers from 0 each.
        phase: Of all that is in it: train, eval, prefill, decode or a name of your own.
        tag: Of all that is in it.
        allow_gaps: Take files in which passes are missing, and say so, rather than refuse them.
    """

    experts: int | None = None
    top_k: int | None = None
    dense_blocks: tuple[int, ...] | None = None
    blocks: int | None = None
    model: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    score: str | None = None
    sequence_length: int | None = None
    first_position: int | None = None
    pipeline_stages: int | None = None
    phase: str | None = None
    tag: str | None = None
    allow_gaps: bool = False


@dataclass(slots=True)
class Choices:
    """The routing of one layer in one pass.

    Attributes:
        ids_TK: Any integer dtype: logical expert ids as the experts were given them. -1 where a
            slot holds no choice, in layers of dynamic k only.
        weights_TK: Gate weights; None: the format has none.
        logits_TE: Router logits; None: the format has none.
        prob_TE: The router's full distribution, where the format has that; else it is made of the
            logits, if the layer's `score` is known.
    """

    ids_TK: Ints
    weights_TK: Floats | None = None
    logits_TE: Floats | None = None
    prob_TE: Floats | None = None


@dataclass(slots=True)
class Tokens:
    """Whose tokens a pass has. Leave it out where the file does not tell sequences apart.

    Attributes:
        sequence_T: Number of the sequence each belongs to, one numbering over the whole rank. A
            sequence that cannot be followed from pass to pass is a new one in each.
        position_T: Position in the sequence, from 0.
        token_id_T: Vocabulary ids, -1 where one is not known; None: none is.
        tag_T: Index into `tags` for each token; None: all untagged.
        tags: The tags of this pass.
        request: Request ids of sequences that begin here, by sequence number.
        padding_T: True where padding; None: none is. Padding whose choices are not recorded is
            left out altogether.
    """

    sequence_T: Ints
    position_T: Ints
    token_id_T: Ints | None = None
    tag_T: Ints | None = None
    tags: tuple[str, ...] = ()
    request: dict[int, str] = field(default_factory=dict)
    padding_T: NDArray[np.bool_] | None = None


@dataclass(slots=True)
class Pass:
    """One forward, as it was run.

    Attributes:
        where: Its place in the file, for errors: "record 3", "line 17".
        step, forward: Numbers, growing; `forward` from 0 in every step.
        phase: train, eval, prefill, decode, or `UNKNOWN_PHASE`.
        choices: By layer number (`LayerInfo.layer`): the layers that ran.
        tokens: Whose tokens these are; None: not known.
        t_start_ns, host_ns: When it began (since the epoch), how long it took; None: not known.
    """

    where: str
    step: int
    forward: int
    phase: str
    choices: dict[int, Choices]
    tokens: Tokens | None = None
    t_start_ns: int | None = None
    host_ns: int | None = None


@dataclass(slots=True)
class Sequence:
    """All tokens of one request, which know nothing of the passes that ran them.

    Attributes:
        where: Its place in the file, for errors: "request 3".
        ids_TLK: Logical expert ids, the engines' layout; L as in `Source.layers`, in their order.
        first_position: Position of the first token (a cached prefix has none of its own).
        prompt_tokens: How many of the tokens, from the first on, are prompt; None: not known.
        weights_TLK: Gate weights; None: not there.
        token_id_T: Vocabulary ids; None: not there.
        request, tag: None: not there.
    """

    where: str
    ids_TLK: Ints
    first_position: int = 0
    prompt_tokens: int | None = None
    weights_TLK: Floats | None = None
    token_id_T: Ints | None = None
    request: str | None = None
    tag: str | None = None


@dataclass(slots=True)
class Counted:
    """One pass of which only counts are known.

    Attributes:
        where, step, forward, phase: As in `Pass`.
        count_E: By layer number: choices of each logical expert.
    """

    where: str
    step: int
    forward: int
    phase: str
    count_E: dict[int, Ints]


Item = Pass | Sequence | Counted


@dataclass
class Rank:
    """What one rank recorded.

    Attributes:
        rank: Its number.
        items: Begins to read it, from its start; called once.
        path: Its file, for errors.
        copy: Another rank recorded the same tokens: readers leave these counts out of sums.
    """

    rank: int
    items: Callable[[], Iterator[Item]]
    path: Path
    copy: bool = False


@dataclass
class Source:
    """An opened file, or folder of ranks' files.

    Attributes:
        layers: The MoE layers, numbered 0, 1, … in the order of their decoder blocks. `top_k` None:
            of dynamic k. Fields that the file does not know stay as they are (None).
        ranks: What was recorded, rank by rank.
        lacks: What the format does not hold, and why, for `moe-lens info`: "weights": "SGLang
            records no gate weights". Keys: weights, entropy, steps, sequences, tokens (their rows),
            token ids, tags, phases, times, ….
        model: Name of the model; "": not known.
        notes: What was taken note of while opening, and how often: into the trace's warnings.
    """

    layers: list[LayerInfo]
    ranks: list[Rank]
    lacks: dict[str, str]
    model: str = ""
    notes: dict[str, int] = field(default_factory=dict)

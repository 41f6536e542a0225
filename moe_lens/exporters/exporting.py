"""`export_trace`: a trace, or a part of it, in another tool's format.

Formats of counts, each expert's choices over all that was asked for:

- eplb: `.npy`, int64 `[MoE layers, experts]`: the `weight` of DeepSeek's `eplb.rebalance_experts`,
  and of vLLM's `DefaultEplbPolicy.rebalance_experts`, which takes the same. vLLM 0.33 has no option
  that reads counts or a placement from a file (config/parallel.py): it counts by itself.
- sglang: JSON `{"logical_count": [[…]]}`, a row for each decoder block (zeros: no experts): what
  `--init-expert-location` takes for `init_by_eplb` (srt/eplb/expert_location.py, 0.5.23).

Formats of routing, the ids of whole sequences for routing replay in RL training:

- npy: a folder with `arrays/RANK-SEQUENCE.npy`, `[T, MoE layers, K]`, and `index.json`, which has
  requests, tags and layers.
- vllm-responses: JSONL, `routed_experts` as vLLM answers it: an .npy file in base64, `[T, decoder
  blocks, K]`.
- sglang-responses: JSONL, `meta_info.routed_experts` as SGLang's /generate answers it: base64 of
  int32, `[T, decoder blocks, K]`.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ExportRefused
from moe_lens.exporters.counts import counts_of
from moe_lens.exporters.selection import Selection, blocks_of
from moe_lens.exporters.sequences import Sequences, Whole, sequences_of
from moe_lens.trace.reader import RunFiles, open_run
from moe_lens.trace.whole import written_whole

COUNTS = ("eplb", "sglang")
ROUTING = ("npy", "vllm-responses", "sglang-responses")
INDEX, ARRAYS = "index.json", "arrays"
SINGLE = "have one position, and --without-last leaves it out"


@dataclass
class Exported:
    """What was written.

    Attributes:
        out: The file or folder.
        format: Its format.
        choices: Choices that were counted, in formats of counts.
        sequences, tokens: How many, in formats of routing.
        left_out: Names of sequences that are not in it, by the reason.
    """

    out: Path
    format: str
    choices: int = 0
    sequences: int = 0
    tokens: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)


def export_trace(
    run: Path | str,
    out: Path | str,
    format: str,
    *,
    selection: Selection | None = None,
    blocks: int | None = None,
    without_last: bool = False,
    force: bool = False,
) -> Exported:
    """Write a file, or a folder, whole or not at all.

    Args:
        run: Folder of the trace.
        out: Of the export.
        format: One of `COUNTS` or `ROUTING`.
        selection: What of the trace.
        blocks: Decoder blocks of the model, for engines' formats; None: up to the last with
            experts.
        without_last: Leave out the last position of each sequence. Engines have S - 1 rows for S
            tokens, as the last one that they sample never runs; a trace of forwards over whole
            texts has S.
        force: Replace what is there.

    Raises:
        ExportRefused: The trace does not hold what the format needs, or `out` cannot be written.
        TraceError: `run` cannot be read.
    """
    run, out = Path(run), Path(out)
    if format not in COUNTS + ROUTING:
        raise ExportRefused(
            f"no format is called {format!r}: it is one of {', '.join(COUNTS + ROUTING)}."
        )
    if without_last and format in COUNTS:
        raise ExportRefused(f"--without-last is of sequences: {format} has counts alone.")
    if blocks is not None and format in ("eplb", "npy"):
        raise ExportRefused(f"--blocks is of engines' formats: {format} has MoE layers alone.")
    files = open_run(run)
    selection = selection or Selection()
    _check_out(out, format, force=force)
    try:
        with written_whole(out) as part:
            if format in COUNTS:
                done = _counts(files, part, format, selection, blocks)
            else:
                done = _routing(files, part, format, selection, blocks, without_last=without_last)
            if format == "npy" and out.exists():
                shutil.rmtree(out)
    except OSError as e:
        raise ExportRefused(
            f"{out} cannot be written ({e.strerror or e}): name another with --out."
        ) from e
    done.out = out
    return done


def _check_out(out: Path, format: str, *, force: bool) -> None:
    ending = {"eplb": ".npy", "sglang": ".json"}.get(format)
    if ending is not None and out.suffix != ending:
        raise ExportRefused(f"{out}: {format} is read by its name's ending: end it in {ending}.")
    if not out.exists() or (format == "npy" and out.is_dir() and not any(out.iterdir())):
        return
    if (format == "npy") != out.is_dir():
        what = "a folder" if format == "npy" else "a file"
        raise ExportRefused(f"{out} is there, and {format} is {what}: name another with --out.")
    if not force:
        raise ExportRefused(f"{out} is there already: replace it with --force.")
    if out.is_dir() and {x.name for x in out.iterdir()} != {INDEX, ARRAYS}:
        raise ExportRefused(f"{out} is a folder of something else: name another with --out.")


# -- counts ----------------------------------------------------------------------------------------


def _counts(
    files: RunFiles, part: Path, format: str, selection: Selection, blocks: int | None
) -> Exported:
    counts = counts_of(files, selection)
    if format == "eplb":
        with part.open("wb") as f:
            np.save(f, counts.chosen_LE)
    else:
        if selection.layers is not None:
            raise ExportRefused("--format sglang is of the whole model: leave out --layers.")
        of, count = blocks_of(counts.infos, blocks, files.path)
        chosen_BE = np.zeros((count, counts.chosen_LE.shape[1]), np.int64)
        chosen_BE[of] = counts.chosen_LE
        part.write_text(json.dumps({"logical_count": chosen_BE.tolist()}) + "\n", encoding="utf-8")
    return Exported(part, format, choices=int(counts.chosen_LE.sum()))


# -- routing ---------------------------------------------------------------------------------------


def _routing(
    files: RunFiles,
    part: Path,
    format: str,
    selection: Selection,
    blocks: int | None,
    *,
    without_last: bool,
) -> Exported:
    sequences = sequences_of(files, selection)
    done = Exported(part, format, left_out=sequences.left_out)
    lay: Callable[[NDArray[Any]], NDArray[Any]] = np.ascontiguousarray
    if format != "npy":
        of, count = blocks_of(sequences.infos, blocks, files.path)

        def lay(ids_TLK: NDArray[Any]) -> NDArray[Any]:  # a row for every decoder block
            ids_TBK = np.zeros((len(ids_TLK), count, sequences.top_k), ids_TLK.dtype)
            ids_TBK[:, of] = ids_TLK
            return ids_TBK

    with tempfile.TemporaryDirectory(dir=part.parent, prefix=".export-") as scratch:
        found = _counted(sequences.read(Path(scratch)), done, without_last=without_last)
        if format == "npy":
            _folder(found, part, sequences)
        else:
            as_line = _as_vllm if format == "vllm-responses" else _as_sglang
            with part.open("w", encoding="utf-8") as f:
                for x in found:
                    f.write(json.dumps(as_line(x, lay(x.ids_TLK))) + "\n")
    return done


def _counted(found: Iterator[Whole], done: Exported, *, without_last: bool) -> Iterator[Whole]:
    for x in found:
        if without_last:
            prompt = None if x.prompt_tokens is None else min(x.prompt_tokens, len(x.ids_TLK) - 1)
            x = Whole(x.rank, x.number, x.request, x.tag, prompt, x.ids_TLK[:-1])
        if not len(x.ids_TLK):
            done.left_out.setdefault(SINGLE, []).append(x.name)
        else:
            done.sequences += 1
            done.tokens += len(x.ids_TLK)
            yield x


def _folder(found: Iterator[Whole], part: Path, sequences: Sequences) -> None:
    (part / ARRAYS).mkdir(parents=True)
    listed = []
    for x in found:
        name = f"{ARRAYS}/{x.rank}-{x.number:08d}.npy"
        np.save(part / name, np.ascontiguousarray(x.ids_TLK))
        said = {"file": name, "rank": x.rank, "sequence": x.number, "request": x.request}
        said |= {"tag": x.tag, "tokens": len(x.ids_TLK), "prompt_tokens": x.prompt_tokens}
        listed.append(said)
    index = {
        "shape": ["tokens", "MoE layers", "top_k"],
        "dtype": np.dtype(sequences.dtype).name,
        "top_k": sequences.top_k,
        "layers": [
            {"layer": i.layer, "block": i.block, "experts": i.experts, "path": i.path}
            for i in sequences.infos
        ],
        "sequences": listed,
        "left_out": sequences.left_out,
    }
    (part / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _as_vllm(x: Whole, ids_TBK: NDArray[Any]) -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, ids_TBK)
    said = {"request_id": x.name, "tag": x.tag, "prompt_tokens": x.prompt_tokens}
    return said | {"routed_experts": base64.b64encode(file.getvalue()).decode()}


def _as_sglang(x: Whole, ids_TBK: NDArray[Any]) -> dict[str, Any]:
    """Rows are prompt + completion - 1: the last token of a completion never runs."""
    prompt = len(ids_TBK) if x.prompt_tokens is None else x.prompt_tokens
    return {
        "meta_info": {
            "id": x.name,
            "prompt_tokens": prompt,
            "completion_tokens": len(ids_TBK) - prompt + 1,
            "routed_experts": base64.b64encode(ids_TBK.astype("<i4").tobytes()).decode(),
        }
    }

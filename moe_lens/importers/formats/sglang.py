"""SGLang's expert distribution recorder (sglang 0.5.23, srt/eplb/expert_distribution.py).

Modes stat and stat_approx dump one file of counts (`_sglang_stat`); per_pass (counts) and
per_token (the choices themselves) one file a rank, with a record a pass (`_sglang_file`). A folder
of a dump's files is one run (`_sglang_ranks`). Choices are read pass by pass; token ids and
positions are Python numbers in a pickle, which has to be read at once.

B decoder blocks, T tokens of a pass, K choices, P physical experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats._sglang_file import SLOTS, RankFile, read_records
from moe_lens.importers.formats._sglang_layers import layers_of
from moe_lens.importers.formats._sglang_passes import counts_of, passes_of
from moe_lens.importers.formats._sglang_ranks import Ranks, arrange
from moe_lens.importers.formats._sglang_stat import open_stat
from moe_lens.importers.formats._torch_file import load_torch_file
from moe_lens.importers.source import UNKNOWN_PHASE, Given, Rank, Source

SAYS = "SGLang's expert distribution recorder: a .pt dump, or the folder of a dump's rank files"

_LACKS = {
    "weights": "SGLang's recorder stores no gate weights",
    "entropy": "SGLang's recorder stores no logits",
    "times": "SGLang's recorder stores no times",
}
_LACKS_TOKENS = {
    "sequences": "SGLang's recorder stores no request ids: every piece of a prompt that a pass "
    "ran, and every decoded token, is a sequence of its own",
    "phases": "passes that mix prompts with decoding do not say which tokens are which: their "
    f"phase is {UNKNOWN_PHASE!r}",
}
_LACKS_PASSES = {
    "tokens": "mode per_pass stores counts of experts in a pass, not its tokens",
    "sequences": "mode per_pass stores counts of experts in a pass, not its sequences",
    "phases": "mode per_pass does not say which passes are prefill and which decode",
}
_LAST_MAP = (
    "the file has only the last map of physical to logical experts: if experts were moved during "
    "the recording, earlier passes name wrong ones, and nothing in the file shows it"
)


def recognises(path: Path, head: bytes) -> bool:
    """Whether it is a dump, or a folder that has one."""
    if not path.is_dir():
        return _is_dump(head)
    return any(_is_dump(_head(file)) for file in path.glob("*.pt"))


def open_source(path: Path, given: Given) -> Source:
    """Open a dump.

    Args:
        path: One file, or the folder of a dump's files.
        given: `top_k` where a dump holds counts alone; the others are checked against the file.

    Raises:
        ImportRefused: Damaged, contradictory, of several dumps, or short of a fact; says where.
    """
    paths = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not paths:
        raise ImportRefused(f"{path} has no .pt file.")
    found = [(p, load_torch_file(p)) for p in paths]
    stat = ["logical_count" in data for _, data in found]
    for (p, data), is_stat in zip(found, stat, strict=True):
        if not is_stat and "records" not in data:
            raise ImportRefused(
                f"{p} is no dump of SGLang 0.5.23's recorder: it has neither 'logical_count' nor "
                "'records'."
            )
        if is_stat != stat[0]:
            raise ImportRefused(
                f"{p} and {paths[0].name} are of other modes of the recorder: import one dump at a "
                "time."
            )
    if stat[0]:
        return open_stat(found, given)
    notes: dict[str, int] = {}
    files = []
    for p, data in found:
        file, gaps = read_records(p, data, allow_gaps=given.allow_gaps)
        if gaps:
            notes["passes that are missing in the recording"] = (
                notes.get("passes that are missing in the recording", 0) + gaps
            )
        files.append(file)
    return _open_records(arrange(files, given, folder=path.is_dir()), given, notes)


def _open_records(ranks: Ranks, given: Given, notes: dict[str, int]) -> Source:
    first = ranks.files[0]
    routed_B = np.zeros(len(first.map_BP), bool)
    for file in ranks.files:
        for r in file.records:
            routed_B |= r.count_BP.any(1)
    if not routed_B.any():
        raise ImportRefused(
            f"{first.path}: no pass has any choice: no model ran, or this backend "
            "does not tell the recorder."
        )
    top_k = None
    if first.per_token:
        top_k = _top_k(ranks.files, routed_B)
    blocks, layers, more = layers_of(routed_B, first.experts, given, first.path, top_k)
    lacks = _LACKS | (_LACKS_TOKENS if first.per_token else _LACKS_PASSES)
    if (first.map_BP != np.arange(first.map_BP.shape[1]) % first.experts).any():
        lacks["placement"] = _LAST_MAP

    def of(file: RankFile) -> Rank:
        read = passes_of if file.per_token else counts_of
        return Rank(
            file.rank, lambda: read(file, blocks, top_k or 0), file.path, file.rank in ranks.copies
        )

    return Source(
        layers=layers,
        ranks=[of(file) for file in ranks.files],
        lacks=lacks,
        model=given.model or "",
        notes=notes | ranks.notes | more,
    )


def _top_k(files: list[RankFile], routed_B: NDArray[np.bool_]) -> int:
    """K: choices per token, the same in all passes and blocks that have any.

    Raises:
        ImportRefused: They are not, or no pass has tokens.
    """
    top_k = None
    for file in files:
        for r in file.records:
            T = len(r.token_id_T)
            count_B = r.count_BP.sum(1, dtype=np.int64)
            if T and top_k is None:
                top_k = int(count_B[routed_B][0]) // T
            for b in np.flatnonzero(routed_B & (count_B != T * (top_k or 0))):
                raise ImportRefused(
                    f"{file.path}: {r.where}, block {b}: {int(count_B[b])} choices of {T} tokens, "
                    f"not {top_k} each: some were not recorded (tokens scattered over ranks, or a "
                    "pass in parts)."
                )
    if not top_k or top_k > SLOTS:
        raise ImportRefused(f"{files[0].path}: no pass has tokens with up to {SLOTS} choices.")
    return top_k


def _is_dump(head: bytes) -> bool:
    """`torch.save` writes its pickle first and as it is, keys and all."""
    if not head.startswith(b"PK\x03\x04"):
        return False
    detail = b"forward_pass_id" in head or b"last_physical_to_logical_map" in head
    return b"logical_count" in head or (b"records" in head and detail)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(4096)
    except OSError:
        return b""

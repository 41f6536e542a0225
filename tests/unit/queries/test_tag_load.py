"""Load of each expert by tag, against a plain loop."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.asking import (
    EXPERTS,
    TAGS,
    ask,
    choices,
    kept,
    narrowed,
    ratio,
    relaxed,
    routed_tokens,
    same,
    trace_of,
)
from support.traces import Rows


def total(rows: Rows, column: str, **where: Any) -> int:
    return sum(r[column] for r in rows if all(r[k] == v for k, v in where.items()))


@relaxed
@given(
    load=st.lists(choices(), max_size=40),
    tokens=st.lists(routed_tokens(), max_size=20),
    narrow=narrowed,
)
def test_tag_load(load: Rows, tokens: Rows, narrow: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with trace_of(Path(folder), load=load, routers=tokens) as trace:
            got = ask(trace, "tag_load", narrow, "layer", "tag", "expert")
    of_all_tags = {k: v for k, v in narrow.items() if k != "tag"}
    load, tokens = kept(load, of_all_tags), kept(tokens, of_all_tags)
    shown = [narrow["tag"]] if "tag" in narrow else sorted(TAGS)
    wanted = [
        (layer, tag, expert)
        for layer, experts in enumerate(EXPERTS)
        for tag in shown
        if total(tokens, "tokens", layer=layer, tag=tag)
        for expert in range(experts)
    ]
    assert list(got) == wanted
    for (layer, tag, expert), row in got.items():
        here = total(tokens, "tokens", layer=layer, tag=tag)
        routed = total(load, "routed", layer=layer, tag=tag, expert=expert)
        with_tokens = [t for t in TAGS if total(tokens, "tokens", layer=layer, tag=t)]
        everywhere = sum(
            total(load, "routed", layer=layer, tag=t, expert=expert) for t in with_tokens
        )
        overall = everywhere / total(tokens, "tokens", layer=layer)
        assert (row["tokens"], row["routed"]) == (here, routed)
        assert same(row["share"], routed / here)
        assert same(row["overall_share"], overall)
        assert same(row["lift"], ratio(routed / here, overall))

"""Which text is trained on, which is held out, and how it is cut into windows."""

from __future__ import annotations

import itertools
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from moe_lens.demo import sources
from moe_lens.demo.batches import held_out_windows, training_batch
from moe_lens.demo.corpus import Domain, load_corpus, split, without_copies
from moe_lens.errors import CommandError


@pytest.fixture(scope="module")
def installed() -> list[Domain]:
    return load_corpus()


def test_four_domains_of_real_text(installed: list[Domain]) -> None:
    assert [domain.tag for domain in installed] == ["python", "prose", "javascript", "cpp"]
    words = {"python": b"def ", "prose": b" the ", "javascript": b"function(", "cpp": b"#include"}
    for domain in installed:
        for text in (domain.train, domain.held_out):
            assert text.dtype == np.uint8
            assert words[domain.tag] in text.tobytes(), domain.tag
        assert 300_000 < len(domain.train) < 2_070_000
        assert 40_000 < len(domain.held_out) < 120_000


def test_no_document_is_on_both_sides(installed: list[Domain]) -> None:
    for domain in installed:
        assert len(domain.held_out_names) >= 5
        assert len(set(domain.train_names)) == len(domain.train_names)
        assert set(domain.train_names).isdisjoint(domain.held_out_names)


def test_no_text_of_another_domain(installed: list[Domain]) -> None:
    python = next(domain for domain in installed if domain.tag == "python")
    names = python.train_names + python.held_out_names
    assert not [name for name in names if "pydoc_data" in name or "site-packages" in name]
    assert all((Path(sysconfig.get_path("stdlib")) / name).is_file() for name in names)


def test_javascript_regions_do_not_touch() -> None:
    regions = [(int(n.split("@")[1]), len(text)) for n, text in sources.javascript_documents()]
    for (start, size), (following, _) in itertools.pairwise(regions):
        assert start + size + 1024 <= following


def test_little_held_out_text_is_in_the_training_text_word_by_word(
    installed: list[Domain],
) -> None:
    for domain in installed:
        train, held_out = domain.train.tobytes(), domain.held_out.tobytes()
        starts = range(0, len(held_out) - 64, 500)
        found = sum(held_out[start : start + 64] in train for start in starts)
        assert found < 0.1 * len(starts), domain.tag


def test_copies_of_longer_documents_are_left_out() -> None:
    chapter = b"a line that is long enough to tell\n"
    book = chapter + b"another line that is long enough, too\n" * 3
    other = b"a line of a third kind, found nowhere else\n" * 2
    documents = [("chapter", chapter), ("other", other + b"\n}\n"), ("book", book + b"\n}\n")]
    assert [name for name, _ in without_copies(documents)] == ["other", "book"]


def test_loading_again_gives_the_same(installed: list[Domain]) -> None:
    for first, again in zip(installed, load_corpus(), strict=True):
        assert first.held_out_names == again.held_out_names
        assert (first.train == again.train).all()


def test_a_new_document_moves_no_other() -> None:
    documents = [(f"file{i}", bytes([i]) * 5_000) for i in range(40)]
    before, after = split("x", documents), split("x", [*documents, ("new", b"n" * 5_000)])
    assert len(set(before.held_out_names) ^ set(after.held_out_names)) <= 2
    assert set(before.held_out_names) == set(split("x", documents[::-1]).held_out_names)


def test_missing_text_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match=r"domain 'x': its text \(10 bytes found\)"):
        split("x", [("a", b"0123456789")])
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CommandError, match=r"domain 'prose': the module pydoc_data\.topics"):
        list(sources.prose_documents())
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="domain 'cpp': the package torch"):
        list(sources.cpp_documents())


def test_training_batch_mixes_the_domains_evenly(corpus: list[Domain]) -> None:
    tokens, tags = training_batch(corpus, 8, 16, np.random.default_rng(0))
    assert tokens.shape == (8, 17)
    assert sorted(tags) == ["digits"] * 4 + ["letters"] * 4
    for row, tag in zip(tokens, tags, strict=True):
        domain = next(domain for domain in corpus if domain.tag == tag)
        assert bytes(row.tolist()) in domain.train.tobytes()
    orders = {
        tuple(training_batch(corpus, 8, 16, np.random.default_rng(seed))[1]) for seed in range(9)
    }
    assert len(orders) > 1


def test_held_out_windows_are_spread_and_do_not_overlap(corpus: list[Domain]) -> None:
    text = np.arange(5_000).astype(np.uint8)
    domain = Domain(tag="x", train=text, held_out=text, train_names=(), held_out_names=())
    windows = held_out_windows(domain, 3, 99)
    assert windows.shape == (3, 100)
    assert windows[0, 0] == text[0]
    assert windows[-1, -1] == text[-1]
    assert held_out_windows(domain, 1_000, 99).shape == (50, 100)
    assert (held_out_windows(domain, 1_000, 99).reshape(-1) == text).all()

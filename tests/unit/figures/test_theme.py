"""The colours: even, told apart in any kind of colour blindness, readable on their background."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_lens.figures.palette import DARK, LIGHT, Palette
from moe_lens.figures.text import shown
from moe_lens.figures.theme import NEVER, OCTAVES, figure, template

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SIGHT = {
    "trichromat": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanope": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanope": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}  # fmt: skip
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip

LOOKS = pytest.mark.parametrize("look", [LIGHT, DARK], ids=["light", "dark"])
EYES = pytest.mark.parametrize("sight", SIGHT)


def linear(colour: str) -> NDArray[np.float64]:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(colour: str, sight: str = "trichromat") -> NDArray[np.float64]:
    """CIELAB, as an eye of this kind sees the colour."""
    seen = np.clip(np.array(SIGHT[sight]) @ linear(colour), 0, 1)
    t = XYZ @ seen / np.array([0.95047, 1, 1.08883])
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a: str, b: str, sight: str) -> float:
    return float(np.linalg.norm(lab(a, sight) - lab(b, sight)))


def contrast(a: str, b: str) -> float:
    """WCAG 2's ratio."""
    light, dark = sorted((XYZ[1] @ linear(a), XYZ[1] @ linear(b)), reverse=True)
    return float((light + 0.05) / (dark + 0.05))


def steps_of_lightness(ramp: tuple[str, ...]) -> NDArray[np.float64]:
    return np.diff([lab(colour)[0] for colour in ramp])


@LOOKS
def test_amounts_are_even_in_lightness(look: Palette) -> None:
    steps = steps_of_lightness(look.amount)
    assert np.abs(steps - steps.mean()).max() < 0.05 * abs(steps.mean())
    # Nothing is nearly the paper, much is far from it.
    assert distance(look.amount[0], look.paper, "trichromat") < 15
    assert distance(look.amount[-1], look.paper, "trichromat") > 70


@LOOKS
def test_ratios_are_even_and_symmetric_about_one(look: Palette) -> None:
    steps = np.abs(steps_of_lightness(look.ratio))
    assert np.abs(steps - steps.mean()).max() < 0.05 * steps.mean()
    lightness = np.array([lab(colour)[0] for colour in look.ratio])
    assert np.abs(lightness - lightness[::-1]).max() < 1
    assert len(look.ratio) % 2 == 1


@LOOKS
@EYES
def test_cold_and_hot_and_never_are_told_apart(look: Palette, sight: str) -> None:
    n = len(look.ratio)
    for i in range(n // 2):
        if i < n // 2 - 1:
            assert distance(look.ratio[i], look.ratio[-1 - i], sight) > 20
    assert min(distance(look.never, colour, sight) for colour in look.ratio) > 25


@LOOKS
@EYES
def test_lines_are_told_apart(look: Palette, sight: str) -> None:
    assert min(distance(a, b, sight) for a, b in combinations(look.lines[:4], 2)) > 15
    assert len(set(look.lines)) == len(look.lines)


@LOOKS
def test_text_is_readable(look: Palette) -> None:
    assert contrast(look.text, look.paper) > 10
    assert contrast(look.muted, look.paper) > 4.5
    assert min(contrast(line, look.paper) for line in look.lines) > 2


def test_the_band_of_never_ends_where_the_coldest_colour_begins() -> None:
    for dark, look in ((False, LIGHT), (True, DARK)):
        scale = template(dark=dark).layout.coloraxis2.colorscale
        where = (-OCTAVES - NEVER) / (OCTAVES - NEVER)
        assert scale[0] == (0, look.never)
        assert any(at == pytest.approx(where) and c == look.ratio[0] for at, c in scale)
        assert scale[-1] == (pytest.approx(1), look.ratio[-1])
        middle = (0 - NEVER) / (OCTAVES - NEVER)
        assert any(at == pytest.approx(middle) and c == look.ratio[5] for at, c in scale)


def test_a_figure_starts_light() -> None:
    assert figure("a").layout.template.layout.paper_bgcolor == LIGHT.paper


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain", "plain"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("&lt;", "&amp;lt;"),
        ("$x$", "&#36;x&#36;"),
        ("two\nlines", "two lines"),
        (7, "7"),
    ],
)
def test_text_from_data(value: object, expected: str) -> None:
    assert shown(value) == expected


def test_text_is_cut_before_it_is_escaped() -> None:
    assert shown("<<<<<", 3) == "&lt;&lt;…"

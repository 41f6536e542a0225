"""Results of `moe-lens precision`, made up: rows of tokens, and of weights."""

from __future__ import annotations

import numpy as np

BLANK = {"expert": np.nan, "error": np.nan, "outlier": np.nan, "usage": np.nan}
FORMATS, PARTS, MODES = ("int8", "int4"), ("router", "both"), ("alone", "forced", "free")


def token_rows(layers=2, sequences=3, positions=8):
    rng = np.random.default_rng(0)
    rows = []
    base = rng.random((sequences, positions))
    margin = rng.random((layers, sequences, positions))
    for to in FORMATS:
        for part in PARTS:
            for mode in MODES:
                off = rng.random((sequences, positions))
                for layer, s, t in np.ndindex(layers, sequences, positions):
                    rows.append(
                        {
                            "format": to,
                            "part": part,
                            "mode": mode,
                            "layer": layer,
                            "sequence": s,
                            "position": t,
                            "tag": "a",
                            **BLANK,
                            "base_loss": base[s, t],
                            "loss": base[s, t] + off[s, t],
                            "agreement": rng.integers(0, 3) / 2,
                            "kl": rng.random(),
                            "margin": margin[layer, s, t],
                        }
                    )
    return rows


def weight_rows():
    rng = np.random.default_rng(1)
    rows = []
    for to in FORMATS:
        for layer in range(2):
            for expert in (np.nan, 0, 1, 2):
                router = np.isnan(expert)
                rows.append(
                    {
                        "format": to,
                        "part": "router" if router else "experts",
                        "mode": "weights",
                        "layer": layer,
                        "expert": expert,
                        **dict.fromkeys(("sequence", "position", "base_loss", "loss"), np.nan),
                        **dict.fromkeys(("agreement", "kl", "margin"), np.nan),
                        "tag": None,
                        "error": rng.random(),
                        "outlier": 3 + rng.random(),
                        "usage": np.nan if router else rng.random(),
                    }
                )
    return rows

"""The part of the page Granularity that shows a folder of `moe-lens lab granularity`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from moe_lens.errors import TraceError
from moe_lens.figures.granularity_gap import granularity_gap
from moe_lens.figures.granularity_sweeps import granularity_sweeps
from moe_lens.figures.input_regions import input_regions
from moe_lens.figures.realised_sets import realised_sets
from moe_lens.granularity.findings import Record, gap, sweeps
from moe_lens.granularity.published import SOURCE
from moe_lens.numbers import count
from moe_lens.queries.laboratory import Laboratory, laboratory
from moe_lens_dashboards.components import columns
from moe_lens_dashboards.components.choose import choose
from moe_lens_dashboards.components.notices import failed
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.runs import labs
from moe_lens_dashboards.components.show import chart
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.laboratory import region_table

_HELP = (
    "Layers that use few experts a token are taught what one that uses many does "
    "(arXiv 2505.06839): the laboratory trains them here, and keeps what it finds in a folder."
)


def is_of_a_laboratory(run: OpenRun) -> bool:
    """Whether the run is the routing of one."""
    return bool(_own(run))


def laboratory_section(run: OpenRun) -> None:
    """Draw it: of the run's own laboratory, or of another among the folders that were named."""
    st.subheader("Laboratory: what would fewer experts a token cost?", anchor=False)
    known = labs()
    if not known:
        st.info(plain(_HELP), icon=":material/info:")
        st.code(_command(Path(run.path).parent / "granularity"), language="sh")
        return
    name = choose("laboratory", "Laboratory", list(known), (_own(run) or list(known))[0])
    try:
        found = laboratory(known[name])
        _about(found)
        _students(found)
        _sets(found)
        _regions(found)
    except TraceError as e:
        failed(e)


def _own(run: OpenRun) -> list[str]:
    return [name for name, path in labs().items() if Path(run.path).is_relative_to(path)]


def _command(folder: Path) -> str:
    return f"moe-lens lab granularity --out {folder}"


def _about(found: Laboratory) -> None:
    said = found.about
    st.caption(
        plain(
            f"Preset {said['preset']}, {said['kind']} experts, hidden size "
            f"{said['hidden']}, seed {said['seed']}, {count(said['steps'])} steps of "
            f"{count(said['batch'])} tokens."
        )
    )
    if found.missing:
        st.warning(
            f"{found.missing} of {len(said['students'])} students are still to be trained; if "
            "nobody is at it, the same command goes on from here.",
            icon=":material/pause:",
        )


def _students(found: Laboratory) -> None:
    rows = found.rows()
    equal, scaled = gap(found, rows), sweeps(found, rows)
    left, right = st.columns(2)
    with left:
        chart(granularity_gap(pd.DataFrame(equal)), key="gap")
    with right:
        chart(granularity_sweeps(pd.DataFrame(scaled)), key="sweeps")
    every = pd.DataFrame(
        [row | {"larger": _larger(row)} for row in [*equal, *scaled] if row.get("factor") != 1]
    )
    if every.empty:
        return
    shown = {
        "teacher": columns.text("teacher", help="16e8a: 16 experts, 8 of a token."),
        "student": columns.text("student"),
        "larger": columns.text(
            "scaled",
            help="Wider experts, or more of them, than the student of equal active parameters has.",
        ),
        "width": columns.whole("width", help="Neurons of an expert."),
        "nmse": columns.digits("error", help="Squared, over that of predicting zero."),
        "published": columns.digits("the author's", help=SOURCE),
        "affine_nmse": columns.digits("best affine map"),
        "fvu": columns.digits("FVU", help="Squared error over that of predicting the mean."),
        "sets_used": columns.whole("sets in use", help="Of experts that the test tokens chose."),
        "possible": columns.whole("possible", help="C(m, k)"),
        "seconds": columns.number("seconds", 1, help="Of the training."),
    }
    if every["published"].isna().all():
        del shown["published"]
    st.dataframe(every[list(shown)], hide_index=True, column_config=shown)
    if "published" in shown:
        st.caption(plain(f"The author's: {SOURCE}."))


def _larger(row: Record) -> str:
    return f"{row['factor']:g}× {row['swept']}" if "swept" in row else ""


def _sets(found: Laboratory) -> None:
    made = found.table("configurations")
    regions = found.table("regions")
    if made.empty and regions.empty:
        st.caption("Regions and sets are counted when all students are trained.")
        return
    left, right = st.columns(2)
    with left:
        chart(realised_sets(made), key="realised")
    with right:
        st.markdown("**Regions of a plane, one for each set of experts**")
        st.caption(
            "On the unit circle, in a square with a bias, and on a plane through what was trained."
        )
        shown = {
            "where": columns.text("where"),
            "router": columns.text("router"),
            "layer": columns.text("layer", help="16e8a: 16 experts, 8 of a token."),
            "regions": columns.text("regions", help="Of several routers: from least to most."),
            "median": columns.number("median", 0),
            "possible": columns.whole("possible", help="C(m, k)"),
        }
        st.dataframe(region_table(regions), hide_index=True, column_config=shown, height=330)


def _regions(found: Laboratory) -> None:
    points = found.table("pictures")
    if points.empty:
        return
    names = list(points["picture"].unique())
    left, right = st.columns(2)
    for side, parameter, default in ((left, "picture", 0), (right, "beside", 1)):
        with side:
            label = "Regions of the router" if side is left else "Beside it"
            name = choose(parameter, label, names, names[min(default, len(names) - 1)])
            chart(input_regions(points[points["picture"] == name]), key=parameter)

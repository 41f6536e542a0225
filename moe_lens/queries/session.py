"""`Trace`: one or several runs, open for questions. What `moe_lens.open` returns.

Data comes from `trace.reader` (segments and open streams) through an in-memory DuckDB whose views
are named as the tables of the trace; answers leave as `Result`.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import duckdb
import pyarrow as pa

from moe_lens.errors import QueryError, TraceError
from moe_lens.queries.about import unique_names
from moe_lens.queries.catalog import question, questions
from moe_lens.queries.info import Info, RunInfo, run_info
from moe_lens.queries.mistakes import explain
from moe_lens.queries.result import Result
from moe_lens.queries.views import create_views
from moe_lens.trace.reader import RunFiles, open_run

PathLike = str | Path


class Trace:
    """One or several runs, read as they were when opened (or last refreshed).

    The views are the tables of the trace (`load`, `layers`, `routers`, `slices`, `steps`,
    `sequences`, `tokens`, `routing`, `outcomes`, `logits`), each with the columns `run` and `rank`
    in front, over all ranks, sealed or not; plus `moe_layers`, `moe_experts` and `runs` from the
    meta files, and what was measured: `replay` and `replay_ep` by `moe-lens replay`,
    `counterfactual` by `moe-lens counterfactual`. Rows that a later attempt overtook are left out,
    and so are the counts of ranks that are copies.

    May be used from several threads; queries then wait for each other.
    """

    def __init__(self, paths: Iterable[PathLike], *, skip_damaged: bool = False) -> None:
        self._paths = unique_names([Path(p) for p in paths])
        self._skip_damaged = skip_damaged
        self._lock = threading.RLock()
        self._files: dict[str, RunFiles] = {}
        self._views: list[str] = []
        self._closed = False
        self._con = duckdb.connect(
            # Without these a mistyped s3:// path waits for a download that may not be wanted.
            config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
        )
        self._con.execute("set enable_progress_bar = false")
        try:
            self.refresh()
        except BaseException:
            self._con.close()
            raise

    @property
    def runs(self) -> list[str]:
        """Names of the runs, as in the column `run`."""
        return list(self._paths)

    @property
    def views(self) -> list[str]:
        """Names that a query can read from."""
        return list(self._views)

    def refresh(self) -> None:
        """Look at the files again: rows written since are seen from now on.

        Raises:
            TraceError: A run cannot be read any more; the trace then stays as it was.
        """
        with self._lock:
            self._files = {
                name: open_run(path, skip_damaged=self._skip_damaged, checked=self._checked(name))
                for name, path in self._paths.items()
            }
            self._views = create_views(self._con, self._files)

    def info(self) -> Info:
        """What the trace holds: runs, ranks, layers, tokens, bytes, and what went wrong."""
        totals = {row["run"]: row for row in self.query("run_totals").rows()}
        return Info([run_info(name, f, totals[name]) for name, f in self._files.items()])

    def sql(self, text: str, **parameters: object) -> Result:
        """Run SQL over the views; `$name` in it takes the parameter `name`.

        Raises:
            QueryError: DuckDB refused it; the message lists the views.
        """
        with self._lock:
            try:
                return self._run(text, parameters)
            except duckdb.IOException:
                # A segment was pruned (`max_bytes`) since the files were listed.
                self.refresh()
            try:
                return self._run(text, parameters)
            except duckdb.IOException as e:
                raise explain(e, self._views) from e

    def query(self, name: str, **parameters: object) -> Result:
        """Run a stored question; `moe_lens.queries.catalog.questions()` lists them.

        Raises:
            QueryError: No such question, or a parameter that it does not have.
        """
        asked = question(name)
        return self.sql(asked.sql, **asked.bind(parameters))

    def table(self, name: str) -> Result:
        """All rows of a view.

        Raises:
            QueryError: There is no such view.
        """
        if name not in self._views:
            raise QueryError(f"There is no view {name!r}. Views: {', '.join(self._views)}.")
        with self._lock:
            return self._run(f"from {name}", {})

    def questions(self) -> list[str]:
        """Names of the stored questions."""
        return list(questions())

    def close(self) -> None:
        """Let go of files and memory. Queries fail afterwards."""
        with self._lock:
            self._closed = True
            self._con.close()
            self._files = {}

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else ", ".join(self._paths)
        return f"<moe_lens.Trace {state}>"

    def _repr_html_(self) -> str:
        if self._closed:
            return f"<p>{html.escape(repr(self))}</p>"
        return "".join(
            f"<table><caption>{html.escape(run.run)}</caption>"
            + "".join(
                f"<tr><th>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>"
                for label, text in run.lines()
            )
            + "</table>"
            for run in self.info().runs
        )

    def _run(self, text: str, parameters: dict[str, object]) -> Result:
        if self._closed:
            raise TraceError("This trace was closed. Open it again with moe_lens.open.")
        try:
            answer = self._con.sql(text, params=parameters or None)
            if answer is None:  # an empty text
                return Result(pa.table({}))
            return Result(answer.to_arrow_table())
        except duckdb.IOException:
            raise
        except duckdb.Error as e:
            raise explain(e, self._views) from e
        except RuntimeError as e:
            if "interrupted" in str(e):  # what DuckDB makes of Ctrl-C
                raise KeyboardInterrupt from e
            raise

    def _checked(self, name: str) -> frozenset[Path]:
        files = self._files.get(name)
        if files is None:
            return frozenset()
        return frozenset(
            p for ranks in files.segments.values() for paths in ranks.values() for p in paths
        )


def open_trace(path: PathLike | Iterable[PathLike], *, skip_damaged: bool = False) -> Trace:
    """Open a run, or several to compare.

    Args:
        path: Folder of a run, or folders of several.
        skip_damaged: Leave out segments that cannot be read, and list them in `info()`.

    Raises:
        TraceError: A path is no trace, or is damaged, or of a newer format.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise TraceError("No path given. Name at least one run.")
    return Trace(paths, skip_damaged=skip_damaged)


def one_run(trace: Trace) -> RunInfo:
    """The run of a trace that has one.

    Raises:
        QueryError: It has several.
    """
    runs = trace.info().runs
    if len(runs) > 1:
        raise QueryError(f"This takes one run at a time; got {', '.join(trace.runs)}.")
    return runs[0]

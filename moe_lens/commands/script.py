"""Runs a Python script or module in this process, as `python` would have run it.

It becomes `__main__`, with its own `sys.argv` and `sys.path`. Nothing is imported on its behalf:
`when_imported` waits for it, so that an environment variable that it sets before `import torch`
still counts. What it raises is printed without frames of ours.
"""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType


def run_script(
    words: list[str], *, module: bool, hidden: Collection[str] = ()
) -> BaseException | None:
    """Run a script or module as `__main__`.

    Args:
        words: Path of a script, or name of a module, and its arguments.
        module: The first word names a module, as after `python -m`.
        hidden: Files whose frames are left out of tracebacks, as those of this file are.

    Returns:
        What ended it, if not its last line; already printed, except a `SystemExit`.
    """
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    try:
        if module:
            _run_module(words)
        else:
            _run_file(words, main)
    except SystemExit as e:
        return e
    except BaseException as e:
        _hide_frames(e, {__file__, *hidden}, set())
        sys.excepthook(type(e), e, e.__traceback__)
        return e
    return None


def _run_file(words: list[str], main: ModuleType) -> None:
    path = os.path.abspath(words[0])
    sys.argv = list(words)
    _first_on_path(os.path.dirname(os.path.realpath(path)))
    main.__file__ = path
    main.__dict__["__cached__"] = None
    main.__loader__ = SourceFileLoader("__main__", path)
    with io.open_code(path) as f:
        source = f.read()
    exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)


def _run_module(words: list[str]) -> None:
    _first_on_path(os.getcwd())
    sys.argv = ["-m", *words[1:]]
    # What `python -m` itself calls; `run_module` takes the module out of `sys.modules` at its end.
    runpy._run_module_as_main(words[0])  # type: ignore[attr-defined]


def _first_on_path(folder: str) -> None:
    """Put the script's folder where ours was; with -P or -I, Python puts none there."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _hide_frames(error: BaseException, files: Collection[str], seen: set[int]) -> None:
    """Take frames of these files out of an exception's traceback, and out of those behind it."""
    if id(error) in seen:
        return
    seen.add(id(error))
    kept = None
    frames = []
    tb = error.__traceback__
    while tb is not None:
        frames.append(tb)
        tb = tb.tb_next
    for tb in reversed(frames):
        if tb.tb_frame.f_code.co_filename not in files:
            tb.tb_next, kept = kept, tb
    error.__traceback__ = kept
    group = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for other in (error.__cause__, error.__context__, *group):
        if other is not None:
            _hide_frames(other, files, seen)


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Call `then` once a top-level package was imported, by whom ever; now, if it was before."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Awaited(name, then))


class _Awaited(MetaPathFinder):
    """Finds one package as it would be found without us, and tells when it has run."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self._then()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

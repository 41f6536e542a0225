"""`moe-lens dashboard`: look at runs in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_lens.commands.arguments import SkipDamaged
from moe_lens.errors import CommandError

_HOST = "127.0.0.1"
_SECONDS = 60


def dashboard(
    run: Annotated[
        list[Path],
        typer.Argument(help="Folders of traces, or folders with traces in them.", metavar="RUN..."),
    ],
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 8501,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open a browser at it.")
    ] = False,
    skip_damaged: SkipDamaged = False,
) -> None:
    """Look at runs in a browser: health, load, drops, routers, and the SQL behind every chart.

    It is served to this machine only, sends nothing anywhere, and reads a run while it is written.

    \b
    Examples:
      moe-lens dashboard traces/demo
      moe-lens dashboard traces/run1 traces/run2 --port 8600
      moe-lens dashboard traces
    """  # noqa: D301  (\b keeps the lines as they are)
    import json
    import os
    import signal
    import subprocess
    import sys

    from moe_lens.queries.about import unique_names
    from moe_lens.queries.places import find_runs
    from moe_lens.trace.reader import open_run

    found = list(dict.fromkeys(p.resolve() for place in run for p in find_runs(place)))
    unique_names(found)
    for place in run:
        if place.resolve() in found:  # named itself: better to hear of damage here
            open_run(place, skip_damaged=skip_damaged)
    _check_port(port)

    import moe_lens_dashboards

    app = Path(moe_lens_dashboards.__file__).with_name("app.py")
    address = f"http://{_HOST}:{port}"
    environment = {**os.environ, "MOE_LENS_RUNS": json.dumps([str(p.absolute()) for p in run])}
    if skip_damaged:
        environment["MOE_LENS_SKIP_DAMAGED"] = "1"
    # Ended from outside, it takes the server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    many = len(found) != 1
    typer.echo(f"{len(found)} run{'s' if many else ''} at {address} (Ctrl-C ends it)")
    sys.stdout.flush()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "streamlit", "run", str(app)),
            "--server.headless=true",
            f"--server.address={_HOST}",
            f"--server.port={port}",
            "--server.fileWatcherType=none",
            "--browser.gatherUsageStats=false",
            "--global.developmentMode=false",
            "--client.toolbarMode=minimal",
            "--client.showErrorDetails=none",
            "--logger.level=warning",
            # Of both looks: with a theme of its own the page would not follow the reader's.
            "--theme.light.primaryColor=#0072B2",
            "--theme.dark.primaryColor=#56B4E9",
        ],
        env=environment,
        # Its banner would repeat the address; what goes wrong it says on stderr.
        stdout=subprocess.DEVNULL,
    )
    try:
        if open_browser:
            _open_when_ready(address, server)
        code = server.wait()
    finally:
        _end(server)
    if code:
        raise CommandError(f"The dashboard ended by itself, with exit code {code}.", 1)


def _check_port(port: int) -> None:
    import socket

    if not _free(port):
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            other = probe.getsockname()[1]
        near = next((p for p in range(port + 1, min(port + 20, 65536)) if _free(p)), other)
        raise CommandError(f"Port {port} is in use. Try another: --port {near}.")


def _free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        # As servers do: a port that a connection just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _open_when_ready(address: str, server: object) -> None:
    import subprocess
    import time
    import webbrowser
    from urllib.error import URLError
    from urllib.request import urlopen

    assert isinstance(server, subprocess.Popen)
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urlopen(f"{address}/_stcore/health", timeout=2).close()
        except (URLError, OSError):
            time.sleep(0.2)
        else:
            webbrowser.open(address)
            return


def _end(server: object) -> None:
    import subprocess

    assert isinstance(server, subprocess.Popen)
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

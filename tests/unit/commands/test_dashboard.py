"""`moe-lens dashboard`: what it says before it starts, and that it starts and ends cleanly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from support.dashboard import free_port
from support.traces import write_run


def dashboard(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_lens", "dashboard", *map(str, words)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / 'run it\'s "1"'
    write_run(path)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is an empty folder"),
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: (p.mkdir(), (p / "x.txt").write_text("x")), "is not a moe_lens trace"),
        (
            lambda p: (write_run(p), next(p.glob("load/*/*.parquet")).write_bytes(b"PAR1")),
            "--skip-damaged",
        ),
    ],
    ids=["missing", "empty", "file", "foreign", "damaged"],
)
def test_no_run_is_an_error_in_one_line(tmp_path: Path, make: object, says: str) -> None:
    place = tmp_path / "place"
    make(place)  # type: ignore[operator]
    done = dashboard(place)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert str(place) in done.stderr


def test_a_port_in_use_is_an_error_that_names_another(run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = dashboard(run, "--port", port)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: Port {port} is in use. Try another: --port ")
    other = int(done.stderr.split()[-1].rstrip("."))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", other))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_this_machine_only_and_ends_cleanly(run: Path, how: signal.Signals) -> None:
    port = free_port()
    started = subprocess.Popen(
        [sys.executable, "-m", "moe_lens", "dashboard", str(run.parent), "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with started:
        try:
            assert started.stdout is not None
            said = started.stdout.readline()
            assert said == f"1 run at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
            wait_for(f"http://127.0.0.1:{port}/_stcore/health", started)
            listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
            hexadecimal = f":{port:04X}"
            hosts = {
                words[1].split(":")[0]
                for words in map(str.split, listening)
                if words[1].endswith(hexadecimal) and words[3] == "0A"
            }
            assert hosts == {"0100007F"}  # 127.0.0.1
        finally:
            os.killpg(started.pid, how)  # Ctrl-C reaches the whole group
        out, err = started.communicate(timeout=30)
    assert started.returncode == (130 if how == signal.SIGINT else 143)
    assert out == ""
    assert "Traceback" not in err
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def wait_for(url: str, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urlopen(url, timeout=2).close()
            return
        except OSError:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

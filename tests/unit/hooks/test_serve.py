"""A recorder that is controlled over HTTP: what is answered, to whom, and what it leaves alone."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.tables import frame

import moe_lens
from moe_lens.errors import ControlError, TraceWriteError
from moe_lens_hooks.serve import BODY_BYTES

IDS = torch.arange(12).reshape(3, 4)
TOKEN = "a-token-for-tests"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def rec(model, run):
    with moe_lens.record(model, run, tokens=1.0) as recorder:
        yield recorder
        model(IDS)  # a recording that saw nothing is a breach


@pytest.fixture
def control(rec):
    with moe_lens.serve(rec, token=TOKEN) as server:
        yield server


def ask(control, method, path, *, body=None, **headers):
    """(status code, JSON, headers) of a request with the right token, unless `headers` differ."""
    given = {"Authorization": f"Bearer {control.token}"} | headers
    given = {name.replace("_", "-"): x for name, x in given.items() if x is not None}
    connection = http.client.HTTPConnection("127.0.0.1", control.port, timeout=20)
    try:
        connection.request(method, path, body=body, headers=given)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    return response.status, json.loads(text) if text else None, response.headers


def raw(control, text):
    """What is answered to these bytes."""
    with socket.create_connection(("127.0.0.1", control.port), timeout=20) as s:
        s.sendall(text)
        s.shutdown(socket.SHUT_WR)
        answer = b""
        while part := s.recv(4096):
            answer += part
    return answer


def test_start_stop_flush_status(model, run, rec, control):
    model(IDS)
    code, said, _ = ask(control, "POST", "/stop")
    assert (code, said["state"], said["taken_up"]) == (200, "paused", False)
    model(IDS)
    code, said, headers = ask(control, "GET", "/status")
    assert code == 200
    assert headers["Content-Type"] == "application/json"
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert said == {
        "state": "paused",
        "taken_up": True,
        "path": str(run),
        "rank": 0,
        "step": 1,
        "steps_recorded": 1,
        "forwards_recorded": 1,
        "forwards_not_recorded": 1,
        "lost_rows": 0,
        "breaches": 0,
        "waiting": said["waiting"],
        "error": None,
    }
    ask(control, "POST", "/start")
    with rec.step():
        model(IDS)
        model(IDS)
    assert ask(control, "POST", "/flush")[:2][0] == 200
    assert frame(run, "steps").step.tolist() == [0, 2, 2]  # while it is recorded
    said = ask(control, "GET", "/status")[1]
    assert (said["steps_recorded"], said["forwards_recorded"]) == (2, 3)
    assert said["waiting"] == 0


@pytest.mark.parametrize(
    ("code", "method", "path", "headers"),
    [
        (401, "GET", "/status", {"Authorization": None}),
        (401, "GET", "/status", {"Authorization": "Bearer wrong"}),
        (401, "POST", "/stop", {"Authorization": f"Basic {TOKEN}"}),
        (401, "POST", "/stop", {"Authorization": TOKEN}),
        (401, "POST", "/stop", {"Authorization": f"Bearer {TOKEN}x"}),
        (401, "POST", "/stop", {"Authorization": "Bearer"}),
        (401, "GET", "/nothing", {"Authorization": None}),
        (401, "POST", f"/stop?token={TOKEN}", {"Authorization": None}),
        (403, "POST", "/stop", {"Host": "evil.example"}),
        (403, "POST", "/stop", {"Host": "127.0.0.1.evil.example"}),
        (403, "POST", "/stop", {"Host": "localhost:80.evil.example"}),
        (404, "POST", "/", {}),
        (404, "POST", "/stop/", {}),
        (404, "POST", "/stop?now", {}),
        (405, "GET", "/stop", {}),
        (405, "POST", "/status", {}),
        (405, "HEAD", "/status", {}),
        (405, "OPTIONS", "/stop", {}),
        (405, "DELETE", "/stop", {}),
        (405, "BREW", "/stop", {}),
        (400, "POST", "/stop", {"Content_Length": "-1"}),
        (400, "POST", "/stop", {"Content_Length": "many"}),
        (400, "POST", "/stop", {"Content_Length": "9" * 5000}),
        (400, "POST", "/stop", {"Transfer_Encoding": "chunked"}),
    ],
)
def test_bad_requests(control, capfd, code, method, path, headers):
    answered, said, got = ask(control, method, path, **headers)
    assert answered == code
    if method != "HEAD":
        assert set(said) == {"error"}
        assert "\n" not in said["error"]
        assert TOKEN not in said["error"].replace(path, "")
    if code == 401:
        assert got["WWW-Authenticate"] == "Bearer"
    if code == 405:
        assert got["Allow"] in ("GET", "POST")
    assert ask(control, "GET", "/status")[1]["state"] == "recording"  # nothing was stopped
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /status HTTP/9.9\r\n\r\n", b"505"),
        (b"GET /status HTTP/1.0\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n\r\n", b"403"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET /status HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"431"),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"403"),
    ],
)
def test_what_is_no_request(control, capfd, text, code):
    answer = raw(control, text)
    assert code in answer.split(b"\r\n")[0]
    assert b"<html" not in answer.lower()
    assert capfd.readouterr().err == ""


def test_bodies_are_ignored_up_to_a_limit(control):
    assert ask(control, "POST", "/start", body=b"{}")[0] == 200
    assert ask(control, "POST", "/start", body=b"x" * BODY_BYTES)[0] == 200
    length = {"Content_Length": str(BODY_BYTES + 1)}
    assert ask(control, "POST", "/start", body=b"x" * BODY_BYTES, **length)[0] == 413


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:8080"])
def test_hosts_of_a_tunnel(control, host):
    assert ask(control, "GET", "/status", Host=host)[0] == 200


def test_a_client_that_hangs_up_is_no_error(control, capfd):
    for text in (b"", b"POST /flush HT", b"GET /status HTTP/1.1\r\nHost: localhost\r\n"):
        with socket.create_connection(("127.0.0.1", control.port)) as s:
            s.sendall(text)
    assert ask(control, "GET", "/status")[0] == 200
    assert capfd.readouterr().err == ""


def test_the_token_is_new_each_time_and_is_not_shown(rec):
    with moe_lens.serve(rec) as one, moe_lens.serve(rec) as two:
        assert len(one.token) >= 32
        assert one.token != two.token
        assert one.token not in repr(one) + str(one) + one.url
        assert ask(one, "GET", "/status", Authorization=f"Bearer {two.token}")[0] == 401


def test_only_this_machine_is_listened_to(control):
    assert control.url == f"http://127.0.0.1:{control.port}"
    assert control._server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"port": -1}, "is no port"),
        ({"port": 70_000}, "is no port"),
        ({"token": ""}, "visible ASCII"),
        ({"token": "two words"}, "visible ASCII"),
        ({"token": "line\nbreak"}, "visible ASCII"),
        ({"token": "schlüssel"}, "visible ASCII"),
    ],
)
def test_what_serve_refuses(rec, given, match):
    with pytest.raises(ControlError, match=match) as e:
        moe_lens.serve(rec, **given)
    assert "\n" not in str(e.value)
    assert not given.get("token") or given["token"] not in str(e.value)


def test_a_port_in_use_and_what_is_no_recorder(rec, control):
    with pytest.raises(ControlError, match=rf"{control.port}: Address already in use\. Give anoth"):
        moe_lens.serve(rec, control.port)
    with pytest.raises(ControlError, match="got str"):
        moe_lens.serve("traces/run")
    port = control.port
    control.close()
    control.close()
    with moe_lens.serve(rec, port) as again:  # it is free again
        assert ask(again, "GET", "/status")[0] == 200


def test_after_close(model, run):
    rec = moe_lens.record(model, run)
    model(IDS)
    with moe_lens.serve(rec) as control:
        rec.close()
        assert ask(control, "GET", "/status")[1]["state"] == "closed"
        for path in ("/start", "/stop", "/flush"):
            code, said, _ = ask(control, "POST", path)
            assert code == 409
            assert said == {"error": f"the recording into {run} is closed"}


def test_a_full_disk_is_told_and_the_model_runs_on(model, run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="No space left"):
        with moe_lens.record(model, run, on_write_error="warn") as rec:
            with moe_lens.serve(rec) as control:
                bare = model(IDS)
                monkeypatch.setattr(rec._writer._store, "append", full)
                code, said, _ = ask(control, "POST", "/flush")
                assert code == 500
                assert "No space left on device" in said["error"]
                assert "\n" not in said["error"]
                assert torch.equal(model(IDS), bare)
                said = ask(control, "GET", "/status")[1]
                assert said["state"] == "failed"
                assert "No space left" in said["error"]
                assert ask(control, "POST", "/start")[0] == 500
                with pytest.raises(TraceWriteError, match="No space left"):
                    rec.start()


def test_flushes_of_eight_threads_while_the_model_runs(model, run):
    codes, done = [], threading.Event()

    def flush(control):
        while not done.is_set():
            codes.append(ask(control, "POST", "/flush")[0])

    with moe_lens.record(model, run, tokens=1.0) as rec, moe_lens.serve(rec) as control:
        threads = [threading.Thread(target=flush, args=(control,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for i in range(60):
            with rec.step(tags=str(i % 3)):
                rec.log("mine", torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2), experts=2)
                rec.log("mine", torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2), experts=2)
                model(IDS)
        done.set()
        for thread in threads:
            thread.join()
    assert set(codes) == {200}
    steps = frame(run, "steps").sort_values(["step", "forward"])
    assert steps.step.tolist() == [i for i in range(60) for _ in range(3)]
    assert not steps.breaches.any()
    assert frame(run, "load").groupby("layer").routed.sum().tolist() == [2 * 60 * 8, *[60 * 24] * 2]


def test_switches_of_four_threads_while_the_model_runs(model, run):
    """Whatever they ask for and when: what is in the trace is whole."""
    done = threading.Event()

    def switch(control):
        while not done.is_set():
            ask(control, "POST", "/start")
            ask(control, "POST", "/stop")

    with moe_lens.record(model, run, tokens=1.0) as rec, moe_lens.serve(rec) as control:
        threads = [threading.Thread(target=switch, args=(control,)) for _ in range(4)]
        model(IDS)
        for thread in threads:
            thread.start()
        for _ in range(300):
            model(IDS)
        done.set()
        for thread in threads:
            thread.join()
        said = ask(control, "GET", "/status")[1]
    assert said["forwards_recorded"] + said["forwards_not_recorded"] == 301
    steps = frame(run, "steps")
    assert len(steps) == said["forwards_recorded"]
    assert set(steps.fires_seen) == set(steps.fires_expected) == {2}
    assert len(frame(run, "routing")) == 2 * 12 * len(steps)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_commands_of_the_documentation(rec, model, control):
    page = (Path(__file__).parents[3] / "docs" / "hooks.md").read_text("utf-8")
    lines = [line for line in page.splitlines() if line.startswith("curl ")]
    states = []
    for line in lines:
        command = line.replace(":9123/", f":{control.port}/")
        given = os.environ | {"MOE_LENS_TOKEN": TOKEN}
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=given)
        assert done.returncode == 0, done.stderr
        states.append(json.loads(done.stdout)["state"])
    assert states == ["recording", "recording", "recording", "paused"]
    rec.start()


CHILD = """
import sys, torch, moe_lens
sys.path.insert(0, {tests!r})
from support.models import TinyModel
torch.manual_seed(0)
model = TinyModel().eval()
rec = moe_lens.record(model, {run!r}, tokens=1.0)
control = moe_lens.serve(rec, token={token!r})
ids = torch.arange(12).reshape(3, 4)
with torch.no_grad():
    for _ in range(5):
        model(ids)
    rec.stop()
    model(ids)
    print(control.port, flush=True)
    sys.stdin.readline()
"""


class At:
    token = TOKEN

    def __init__(self, port):
        self.port = port


def test_what_was_flushed_survives_kill_9(run):
    tests = str(Path(__file__).parents[2])
    text = CHILD.format(tests=tests, run=str(run), token=TOKEN)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", text], **pipes) as child:
        try:
            port = int(child.stdout.readline())
            assert ask(At(port), "POST", "/flush")[0] == 200
        finally:
            child.send_signal(signal.SIGKILL)
    moe_lens.recover(run)
    assert frame(run, "steps").step.tolist() == list(range(5))
    assert len(frame(run, "routing")) == 5 * 2 * 12
    warned = json.loads((run / "meta" / "rank=0.json").read_text())["warnings"]
    assert list(warned.values()) == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_hold_the_port(rec, control):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # lives until the parent closes its end
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        port = control.port
        control.close()
        with moe_lens.serve(rec, port, token=TOKEN) as again:
            assert ask(again, "GET", "/status")[0] == 200
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)

"""A recorder that is controlled from outside: start, stop, flush and status over HTTP on localhost.

    GET  /status    what the recorder is doing, as JSON
    POST /start     record from the next forward on
    POST /stop      record nothing from the next forward on
    POST /flush     what was recorded so far would survive `kill -9` when this returns

Every request carries `Authorization: Bearer TOKEN`. A browser cannot be made to send one: no page
of another origin is answered, and a name that was rebound to this machine is refused by its `Host`.
Requests run on threads of their own, and leave the model and its tensors alone: what is asked for
is a flag that the next forward reads, and a request to the writer's thread.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import socketserver
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from moe_lens.errors import ControlError, TraceWriteError
from moe_lens_hooks.forks import forget_in_child
from moe_lens_hooks.recorder import Recorder

HOST = "127.0.0.1"

MEANT = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]+)?", re.IGNORECASE)
"""What a request may be addressed to, on whatever port: it may come through a tunnel."""

BODY_BYTES = 64 << 10
"""Bodies mean nothing, and no more of one is read."""

PATIENCE_SECONDS = 10.0
"""A client that says nothing for so long is hung up on."""


class Control:
    """A recorder's control server, from construction to `close`; see `serve`.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        url: `http://127.0.0.1:PORT`.
        token: What requests have to carry.
    """

    def __init__(self, rec: Recorder, port: int = 0, *, token: str | None = None) -> None:
        if not isinstance(rec, Recorder):
            got = type(rec).__name__
            raise ControlError(f"serve(rec, …) takes a recorder, what record() returns; got {got}.")
        if not 0 <= port <= 65535:
            raise ControlError(f"{port=} is no port: 1 to 65535, or 0 for one that is free.")
        self.token = secrets.token_urlsafe(32) if token is None else token
        if not re.fullmatch("[!-~]+", self.token):
            raise ControlError(
                "the token must be visible ASCII characters without spaces, as a header takes them "
                "(it is not shown here)."
            )
        try:
            self._server = _Server(rec, port, self.token)
        except OSError as e:
            raise ControlError(
                f"cannot listen on {HOST}:{port}: {e.strerror}. Give another port, or 0 for one "
                "that is free."
            ) from e
        self.port: int = self._server.server_address[1]
        self.url = f"http://{HOST}:{self.port}"
        forget_in_child(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="moe_lens control", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Listen no longer. The recorder stays as it is. A second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _forget(self) -> None:
        """In a forked child: the port is its parent's."""
        self._server.socket.close()

    def __repr__(self) -> str:
        return f"<moe_lens control at {self.url}>"  # the token is nobody's to read in a log

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    def __init__(self, rec: Recorder, port: int, token: str) -> None:
        self.rec, self.token = rec, token.encode()
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        """As HTTPServer does, which would look its own name up in the DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no error."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = PATIENCE_SECONDS
    server_version, sys_version = "moe_lens", ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # every method is answered in one place
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        path = self.path
        refused = self._refused()
        if refused is not None:
            self._say(*refused)
        elif path not in _CALLS:
            self._say(404, {"error": f"no such path; there are {', '.join(_CALLS)}"})
        elif self.command != _CALLS[path][0]:
            method = _CALLS[path][0]
            self._say(405, {"error": f"{path} takes {method}"}, {"Allow": method})
        else:
            self._say(*_called(self.server.rec, _CALLS[path][1]))

    def _refused(self) -> tuple[Any, ...] | None:
        """What is answered to a request that is not to be answered; None: it may be."""
        length = self.headers.get("Content-Length", "0")
        sized = bool(re.fullmatch("[0-9]{1,18}", length))
        sized &= "Transfer-Encoding" not in self.headers
        if sized:  # read, or closing would cut off the answer
            self.rfile.read(min(int(length), BODY_BYTES))
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not MEANT.fullmatch(hosts[0].strip()):
            return 403, {"error": f"Host must be {HOST} or localhost"}
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.server.token)
        if kind.lower() != "bearer" or not right:
            how = {"WWW-Authenticate": "Bearer"}
            return 401, {"error": "this needs the header Authorization: Bearer TOKEN"}, how
        if not sized:
            return 400, {"error": "a request here needs no body, and one of a known length"}
        if int(length) > BODY_BYTES:
            return 413, {"error": f"a request here needs no body, and may have {BODY_BYTES} bytes"}
        return None

    def _say(self, code: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        text = json.dumps(body).encode() + b"\n"
        self.send_response(code)
        own = {"Content-Type": "application/json", "Content-Length": str(len(text))}
        for name, value in {**own, "Cache-Control": "no-store", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses itself: a line that is no request, one that is too long."""
        self.close_connection = True
        self.request_version = "HTTP/1.0"  # with a status, whatever could not be understood
        self._say(code, {"error": message or HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def _called(rec: Recorder, call: Callable[[Recorder], None]) -> tuple[int, dict[str, Any]]:
    """Status code and answer of a call: how the recorder stands after it."""
    asks = call is not _nothing
    if asks and rec._closed:
        return 409, {"error": f"the recording into {rec.path} is closed"}
    try:
        call(rec)
    except TraceWriteError as e:
        closed = rec._closed and rec._writer.failed is None  # it was closed meanwhile
        return (409 if closed else 500), {"error": " ".join(str(e).split())}
    return 200, status(rec)


def status(rec: Recorder) -> dict[str, Any]:
    """How a recorder stands, in types of JSON. Waits for nothing, and may be called on any thread.

    Returns:
        `state`: recording, paused, closed or failed. `taken_up`: False where the model has not come
        to a forward since the last start or stop. `step`: the number of the one that runs or ran
        last. Forwards and steps `recorded`, and forwards `not_recorded` in pauses, of this process.
        `lost_rows`: per-token rows that the writer had to give up. `breaches` found in forwards.
        `waiting`: events that the writer has not written yet. `error`: why it failed.
    """
    switch, writer = rec._switch, rec._writer
    failed = writer.failed
    state = "recording" if switch.wanted else "paused"
    return {
        "state": "closed" if rec._closed else "failed" if failed is not None else state,
        "taken_up": switch.on == switch.wanted,
        "path": str(rec.path),
        "rank": writer.meta.rank,
        "step": rec._numbering.step,
        "steps_recorded": rec._steps,
        "forwards_recorded": rec._forwards,
        "forwards_not_recorded": switch.skipped,
        "lost_rows": writer.lost_rows,
        "breaches": writer.breach_count,
        "waiting": writer.waiting,
        "error": None if failed is None else " ".join(str(failed).split()),
    }


def _nothing(rec: Recorder) -> None:
    """GET /status."""


_CALLS: dict[str, tuple[str, Callable[[Recorder], None]]] = {
    "/status": ("GET", _nothing),
    "/start": ("POST", Recorder.start),
    "/stop": ("POST", Recorder.stop),
    "/flush": ("POST", Recorder._flush_written),
}
"""Method and meaning of each path."""


def serve(rec: Recorder, port: int = 0, *, token: str | None = None) -> Control:
    """Let a recorder be started, stopped, flushed and asked over HTTP, on 127.0.0.1 alone.

    Every rank of a launch serves its own recorder, on a port of its own. The server ends with
    `close`, or with the process.

    Args:
        rec: The recorder.
        port: 0: one that is free, see `port` of what is returned.
        token: What requests have to carry: `Authorization: Bearer TOKEN`. None: a new one.

    Raises:
        ControlError: The port is in use, or is none; the token cannot stand in a header.
    """
    return Control(rec, port, token=token)

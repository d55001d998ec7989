"""Serves a run's metrics to Prometheus: /metrics of each process, the coordinator's http_sd, and a file_sd file as an alternative.

Called by trainer/rank/this_rank.py, cluster/targets.py and cluster/shared_port.py. Everything listens on loopback by default: metrics
reveal hosts, names and losses, and have no authentication. metrics.py defines the metrics, readers.py keeps who has read what."""

import contextlib
import errno
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from cluster.storage import write_atomic_local
from cluster.text import printable

TEXT = "text/plain; version=0.0.4; charset=utf-8"
JSON = "application/json"  # Prometheus refuses http_sd with any other type

LEFTOVER_SECONDS = 10.0
"""How long a previous process may still hold a fixed port: a killed run's coordinator outlives its driver for a moment."""

MOST_BODY_BYTES = 4 << 20
"""The longest request that is read: the targets of 10,000 ranks have half of it."""

Route = tuple[str, Callable[[], bytes]]
"""Content type, and a function that returns the body."""
Post = Callable[[bytes], bytes]
"""Takes the request's body, returns the answer's, which is JSON. ValueError refuses the request."""
Heard = Callable[[str, str, float, Mapping[str, str]], None]
"""Is told of each GET that was answered: path, the client's address, the time.monotonic() at which the request came, its headers by
their names in lower case."""


class Server:
    """An HTTP server in its own thread, until close(). It waits at most `wait_seconds` for a port that is taken. `posts` are for clients on
    this machine only."""

    def __init__(
        self,
        host: str,
        port: int,
        routes: Mapping[str, Route],
        wait_seconds: float = 0,
        *,
        posts: Mapping[str, Post] | None = None,
        heard: Heard | None = None,
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server_class = type("_Http", (ThreadingHTTPServer,), {"address_family": family, "daemon_threads": True})
        end = time.monotonic() + wait_seconds
        while True:
            try:
                self._server = server_class((host, port), _handler(routes, posts or {}, heard))
                break
            except (OSError, OverflowError) as error:
                if isinstance(error, OSError) and error.errno == errno.EADDRINUSE and time.monotonic() < end:
                    time.sleep(0.1)
                    continue
                raise ValueError(
                    f"cannot listen on {host}:{port} ({error}); choose another cluster.metrics_host or port, port 0 takes a free one"
                ) from error
        name = reachable_host(host)
        self.address = f"[{name}]:{self._server.server_port}" if ":" in name else f"{name}:{self._server.server_port}"
        """host:port under which other processes reach it."""
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name=f"http-{port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(registry: CollectorRegistry, host: str = "127.0.0.1", port: int = 0) -> Server:
    """Serve GET /metrics. ValueError if the port is taken."""
    return Server(host, port, {"/metrics": (TEXT, lambda: generate_latest(registry))})


def serve_discovery(
    host: str,
    port: int,
    targets: Callable[[], list[dict[str, Any]]],
    registry: CollectorRegistry | None = None,
    wait_seconds: float = LEFTOVER_SECONDS,
    *,
    heard: Heard | None = None,
) -> Server:
    """Serve GET /sd: Prometheus http_sd of the current targets; with a registry also GET /metrics. ValueError if the port stays taken."""
    routes: dict[str, Route] = {"/sd": (JSON, lambda: json.dumps(targets()).encode())}
    if registry is not None:
        routes["/metrics"] = (TEXT, lambda: generate_latest(registry))
    return Server(host, port, routes, wait_seconds, heard=heard)


def write_file_sd(path: str | Path, targets: list[dict[str, Any]]) -> None:
    """Write Prometheus file_sd, replacing the whole file. Prometheus reads only names that end in .json."""
    if not str(path).endswith(".json"):
        raise ValueError(f"file_sd path {str(path)!r} does not end in .json, Prometheus would not read it; name it {path}.json")
    write_atomic_local(str(path), json.dumps(targets, indent=1).encode())


def reachable_host(host: str) -> str:
    """The name under which others reach a bound address: itself, or this machine's own address for a wildcard."""
    if host not in ("", "0.0.0.0", "::"):
        return host
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return socket.gethostname()


def _handler(routes: Mapping[str, Route], posts: Mapping[str, Post], heard: Heard | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # a client that sends nothing does not block a thread

        def do_GET(self) -> None:
            began, path = time.monotonic(), self.path.partition("?")[0]
            route = routes.get(path)
            if route is None:
                self._answer(404, "text/plain", f"there are only {', '.join(sorted(routes))}\n".encode())
                return
            try:
                body = route[1]()
            except Exception as error:  # one bad answer must not end the server's thread silently
                self._answer(500, "text/plain", f"{type(error).__name__}: {printable(error)}\n".encode())
                return
            self._answer(200, route[0], body)
            if heard is not None:
                heard(path, self.client_address[0], began, {name.lower(): value for name, value in self.headers.items()})

        def do_POST(self) -> None:
            post, length = posts.get(self.path), self.headers.get("Content-Length", "")
            if post is None or self.connection.getsockname()[0] != self.client_address[0]:
                self._answer(404, "text/plain", b"not here\n")
            elif not length.isdecimal() or int(length) > MOST_BODY_BYTES:
                self._answer(413, "text/plain", f"a body of at most {MOST_BODY_BYTES} bytes\n".encode())
            else:
                try:
                    self._answer(200, JSON, post(self.rfile.read(int(length))))
                except ValueError as error:
                    self._answer(400, "text/plain", f"{printable(error)}\n".encode())

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a client that hangs up is no error of ours, and has read nothing
                super().handle()

        def log_message(self, format: str, *args: Any) -> None:
            """Do not log scrapes."""

    return Handler

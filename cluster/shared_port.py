"""One discovery port for all runs on a machine: whoever has it answers for every one of them. Called by targets.py and, to check the port
before a cluster is started, by trainer/drive/start.py.

The first run listens on the port. A run that finds it taken asks the process behind it to list its targets too (`POST /join`, from this
machine only), and again every JOIN_SECONDS: a run that is killed is off the list SILENT_SECONDS later. When the holder ends, one of the
others takes the port. Prometheus is told one address, and no run needs a port of its own."""

import errno
import http.client
import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.exporter import JSON, LEFTOVER_SECONDS, Heard, Server, reachable_host

JOIN_SECONDS = 2.0
SILENT_SECONDS = 10.0
"""A run that has not asked for so long is off the list."""
SETTLE_SECONDS = 2 * JOIN_SECONDS
"""How long a run that has inherited the port answers with an error, upon which Prometheus keeps the targets that it has: the other runs
have yet to ask it."""
MOST_PEERS = 64
JOINED = b'{"finetune": "joined"}'

Targets = list[dict[str, Any]]


class _NotYet(Exception):
    """The list is not complete yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Peer:
    targets: Targets
    heard_at: float


class SharedPort:
    """A run's place on the port, as its holder or as one of the others, until close()."""

    def __init__(
        self, host: str, port: int, listed: Callable[[], Targets], heard: Heard | None = None, wait_seconds: float = LEFTOVER_SECONDS
    ) -> None:
        """`listed` returns this run's targets. ValueError if the port cannot be listened on, or stays with a process that lists no other
        run: it may be a leftover, which is waited for."""
        self._host, self._port, self._listed, self._heard = host, port, listed, heard
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._server: Server | None = None
        self._complete_at = 0.0
        self._news, self._closed = threading.Event(), threading.Event()
        end = time.monotonic() + wait_seconds
        while (problem := self._take()) is not None and not self._join():
            if not _is_taken(problem) or time.monotonic() >= end:
                raise problem
            time.sleep(0.1)
        self._thread = threading.Thread(target=self._keep_place, name=f"discovery-{port}", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """host:port at which Prometheus asks."""
        name = reachable_host(self._host)
        return f"[{name}]:{self._port}" if ":" in name else f"{name}:{self._port}"

    @property
    def is_holder(self) -> bool:
        return self._server is not None

    def changed(self) -> None:
        """This run's targets are others now."""
        self._news.set()

    def close(self) -> None:
        """Leave: the run is off the list, and the port is free for the next one."""
        self._closed.set()
        self._news.set()
        self._thread.join()
        if self._server is not None:
            self._server.close()
        else:
            self._join([])

    def _keep_place(self) -> None:
        while not self._closed.is_set():
            self._news.wait(JOIN_SECONDS)
            self._news.clear()
            if self._server is None and not self._closed.is_set() and not self._join():
                self._complete_at = time.monotonic() + SETTLE_SECONDS
                self._take()  # another one may be faster: then the next round joins it

    def _take(self) -> ValueError | None:
        """Listen on the port. Returns why not."""
        try:
            self._server = Server(self._host, self._port, {"/sd": (JSON, self._all)}, posts={"/join": self._take_in}, heard=self._heard)
        except ValueError as error:
            return error
        return None

    def _join(self, targets: Targets | None = None) -> bool:
        """Ask the holder to list these targets, by default this run's. Returns whether it does."""
        body = json.dumps({"id": self._id, "targets": self._listed() if targets is None else targets}).encode()
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        connection = http.client.HTTPConnection(host, self._port, timeout=JOIN_SECONDS)
        try:
            connection.request("POST", "/join", body, {"Content-Type": JSON})
            return connection.getresponse().read(len(JOINED) + 1) == JOINED
        except (OSError, http.client.HTTPException):  # nobody there, or somebody else
            return False
        finally:
            connection.close()

    def _take_in(self, body: bytes) -> bytes:
        """Another run's request."""
        asked = json.loads(body)
        if not (isinstance(asked, dict) and isinstance(asked.get("id"), str) and _are_targets(asked.get("targets"))):
            raise ValueError("a request is {id, targets: [{targets: [host:port], labels: {name: value}}]}")
        with self._lock:
            self._forget()
            if not asked["targets"]:
                self._peers.pop(asked["id"], None)
            elif asked["id"] in self._peers or len(self._peers) < MOST_PEERS:
                self._peers[asked["id"]] = _Peer(targets=asked["targets"], heard_at=time.monotonic())
            else:
                raise ValueError(f"{MOST_PEERS} runs are listed already")
        return JOINED

    def _all(self) -> bytes:
        """The targets of all runs."""
        if time.monotonic() < self._complete_at:
            raise _NotYet("this run has just inherited the port; the others ask to be listed within seconds")
        with self._lock:
            self._forget()
            others = [target for peer in self._peers.values() for target in peer.targets]
        return json.dumps([*self._listed(), *others]).encode()

    def _forget(self) -> None:
        now = time.monotonic()
        self._peers = {name: peer for name, peer in self._peers.items() if now - peer.heard_at < SILENT_SECONDS}


def _is_taken(error: ValueError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE


def _are_targets(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and each.keys() == {"targets", "labels"}
        and isinstance(each["targets"], list)
        and all(isinstance(address, str) for address in each["targets"])
        and isinstance(each["labels"], dict)
        and all(isinstance(label, str) for label in each["labels"].values())
        for each in value
    )

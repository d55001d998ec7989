"""Several runs on one machine, one discovery port: whoever has it lists them all."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster import shared_port as module
from cluster.exporter import Server, serve_discovery
from cluster.shared_port import SharedPort
from tests.ports import free_ports


def targets(run: str) -> list[dict[str, Any]]:
    return [{"targets": [f"{run}:1"], "labels": {"run": run}}]


def listed(port: int) -> set[str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/sd", timeout=5) as answer:
            return {target["labels"]["run"] for target in json.load(answer)}
    except urllib.error.HTTPError:
        return {"not yet"}
    except OSError:
        return {"nobody"}


def until(port: int, want: set[str], seconds: float = 10.0) -> None:
    end, seen = time.monotonic() + seconds, []
    while (found := listed(port)) != want and time.monotonic() < end:
        seen.append(found)
        time.sleep(0.02)
    assert found == want, seen[-3:]


def ask(port: int, body: bytes) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/join", data=body), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.1)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(module, "SILENT_SECONDS", 1.0)
    [port] = free_ports(1)
    return port


Open = Callable[..., SharedPort]


@pytest.fixture
def opened(port: int) -> Iterator[Open]:
    places: list[SharedPort] = []

    def open_one(run: str, wait_seconds: float = 0.0) -> SharedPort:
        places.append(SharedPort("127.0.0.1", port, lambda: targets(run), wait_seconds=wait_seconds))
        return places[-1]

    yield open_one
    for place in places:
        place.close()


def test_a_second_run_on_the_port_is_listed_with_the_first_and_both_leave_it(port: int, opened: Open) -> None:
    first, second = opened("cats"), opened("dogs")
    assert (first.is_holder, second.is_holder) == (True, False)
    assert first.address == second.address == f"127.0.0.1:{port}"
    assert listed(port) == {"cats", "dogs"}  # at once
    second.close()
    assert listed(port) == {"cats"}


def test_when_the_holder_ends_another_one_answers_for_all_that_are_left(port: int, opened: Open) -> None:
    first, *others = opened("cats"), opened("dogs"), opened("pets")
    first.close()
    seen = set()
    end = time.monotonic() + 10
    while (found := listed(port)) != {"dogs", "pets"} and time.monotonic() < end:
        seen.add(frozenset(found))
    assert found == {"dogs", "pets"}
    assert seen <= {frozenset({"nobody"}), frozenset({"not yet"})}  # upon which Prometheus keeps what it has: never a part of the list
    assert [other.is_holder for other in others].count(True) == 1


def test_what_changes_is_told_at_once(port: int, monkeypatch: pytest.MonkeyPatch, opened: Open) -> None:
    opened("cats")
    monkeypatch.setattr(module, "JOIN_SECONDS", 60.0)
    now = ["dogs"]
    changing = SharedPort("127.0.0.1", port, lambda: targets(now[0]))
    until(port, {"cats", "dogs"})
    now[0] = "wolves"
    changing.changed()
    until(port, {"cats", "wolves"})
    changing.close()


def test_a_run_that_is_killed_is_off_the_list(port: int, opened: Open) -> None:
    opened("cats")
    assert ask(port, json.dumps({"id": "killed", "targets": targets("dogs")}).encode()) == 200
    assert listed(port) == {"cats", "dogs"}
    until(port, {"cats"})


def test_what_is_no_request_is_refused(port: int, opened: Open) -> None:
    opened("cats")
    for body in (b"", b"{", b"[]", b'{"id": 1, "targets": []}', b'{"id": "a", "targets": [{"targets": [1], "labels": {}}]}'):
        assert ask(port, body) == 400, body
    assert listed(port) == {"cats"}


def test_only_so_many_are_listed(port: int, opened: Open) -> None:
    opened("cats")
    asked = [ask(port, json.dumps({"id": str(n), "targets": targets(f"run {n}")}).encode()) for n in range(module.MOST_PEERS + 1)]
    assert asked == [200] * module.MOST_PEERS + [400]


def test_a_port_that_anything_else_has_is_refused_and_a_leftover_is_waited_for(port: int, opened: Open) -> None:
    other = serve_discovery("127.0.0.1", port, list)  # lists no other run
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}"):
        opened("cats")
    threading.Timer(0.2, other.close).start()
    assert opened("cats", wait_seconds=10).is_holder


def test_another_machine_cannot_add_to_the_list() -> None:
    server = Server("0.0.0.0", 0, {}, posts={"/join": lambda body: b"{}"})
    here = urllib.request.Request(f"http://{server.address}/join", data=b"{}")
    port = int(server.address.rpartition(":")[2])
    try:
        assert ask(port, b"{}") == 200
        with urllib.request.urlopen(here, timeout=5) as answer:  # this machine, by its other address
            assert answer.status == 200
        # A client whose address is not the one it has reached is elsewhere: here, loopback's other addresses.
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5, source_address=("127.0.0.2", 0))
        connection.request("POST", "/join", b"{}")
        assert connection.getresponse().status == 404
        connection.close()
    finally:
        server.close()

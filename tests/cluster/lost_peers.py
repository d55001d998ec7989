"""Loses real peers of gloo groups and real stores of c10d, and writes what that raises, described, to standard output.

test_foreign.py runs it as a process of its own, because it forks. Each case is a RankError by name, as a rank would send it."""

import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from cluster.failures import RankError, described

SHORT, LONG = timedelta(seconds=0.2), timedelta(seconds=20)


def raised(action: Callable[[], object]) -> RankError:
    try:
        action()
    except BaseException as error:
        return described(error)
    raise AssertionError("nothing was raised")


def store(port: int = 0, *, timeout: timedelta = LONG) -> TCPStore:
    """A new one, or a connection to the one at `port`."""
    return TCPStore("127.0.0.1", port, 2, is_master=port == 0, timeout=timeout, wait_for_workers=False)


def join(where: TCPStore, rank: int, timeout: timedelta, world_size: int = 2) -> None:
    dist.init_process_group("gloo", store=where, rank=rank, world_size=world_size, timeout=timeout)


def with_peer(peer: Callable[[], object], timeout: timedelta, then: Callable[[], dict[str, RankError]]) -> dict[str, RankError]:
    """What `then` gives on rank 0 of a group whose rank 1 does `peer` once both have reduced something."""
    ours = store()
    child = os.fork()
    join(ours if child else store(ours.port), int(child == 0), timeout)
    dist.all_reduce(torch.ones(4))
    if child == 0:
        peer()
        os._exit(0)
    found = then()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    dist.destroy_process_group()
    return found


def reduced(name: str, *more: str) -> Callable[[], dict[str, RankError]]:
    return lambda: {each: raised(lambda: dist.all_reduce(torch.ones(4))) for each in (name, *more)}


def lost_store() -> RankError:
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        theirs = store()
        os.write(writable, str(theirs.port).encode())
        time.sleep(60)
        os._exit(0)
    ours = store(int(os.read(readable, 20)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    ours.set("a", "b")  # still goes into the socket
    return raised(lambda: ours.get("a"))


def nobody_there() -> RankError:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return raised(lambda: store(port, timeout=SHORT))


def wrong_interface() -> RankError:
    os.environ["GLOO_SOCKET_IFNAME"] = "eth77"
    found = raised(lambda: join(store(), 0, SHORT, world_size=1))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    return found


def main() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    cases = {
        "store that nobody opened": nobody_there(),
        "key that nobody set": raised(lambda: store(timeout=SHORT).get("x")),
        "group that nobody joins": raised(lambda: join(store(), 0, SHORT)),
        "store that went away": lost_store(),
        "wrong interface": wrong_interface(),
        "no memory": raised(lambda: torch.empty(1 << 55)),
        **with_peer(lambda: os.kill(os.getpid(), signal.SIGKILL), LONG, reduced("peer killed", "peer killed, again")),
        **with_peer(lambda: time.sleep(60), SHORT, reduced("peer silent", "peer silent, again")),
    }
    pickle.dump(cases, sys.stdout.buffer)


if __name__ == "__main__":
    main()

"""Ranks that join a group, each in a process: `python -m tests.cluster.joining` writes what each got to standard output."""

import os
import pickle
import sys
from typing import Any

import torch
import torch.distributed as dist

from cluster.failures import RankError, described
from cluster.rank import GroupStore, Placement, RankContext

PLACE = Placement(host="here", address="127.0.0.1", node_id="n", local_rank=0, local_world_size=1, device_index=None)


def join(rank: int, world_size: int, seconds: float, call: Any) -> RankError | float:
    """The sum of rank + 1 over the group, or what joining raised."""
    try:
        RankContext(rank=rank, world_size=world_size, attempt=1, place=PLACE, files={}, call=call).join_group(seconds)
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        return float(total)
    except Exception as error:
        return described(error)


def two() -> dict[str, RankError | float]:
    """Both ranks of a group, over the real call: rank 0 publishes its store, rank 1 looks it up."""
    readable, writable = os.pipe()  # from rank 0 to rank 1
    answers, told = os.pipe()  # from rank 1 to the test
    if os.fork() == 0:
        where: GroupStore = pickle.loads(os.read(readable, 1 << 12))
        os.write(told, pickle.dumps(join(1, 2, 30.0, lambda *_: where)))
        os._exit(0)
    mine = join(0, 2, 30.0, lambda method, attempt, name, store: os.write(writable, pickle.dumps(store)))
    return {"one of two": mine, "other of two": pickle.loads(os.read(answers, 1 << 16))}


def with_interface(name: str) -> RankError | float:
    os.environ["GLOO_SOCKET_IFNAME"] = name
    found = join(0, 3, 0.3, lambda *_: None)
    del os.environ["GLOO_SOCKET_IFNAME"]
    return found


def main() -> None:
    cases = {
        "first alone": join(0, 3, 0.3, lambda *_: None),
        "second alone": join(1, 3, 0.3, lambda *_: None),
        "wrong interface": with_interface("nowhere7"),
        **two(),
    }
    pickle.dump(cases, sys.stdout.buffer)


if __name__ == "__main__":
    main()

"""What ranks do in the tests of zygote and agent: small functions that a forked process calls."""

import gc
import os
import re
import signal
import sys
import threading
import time
from typing import Any

from cluster.rank import RankContext


def say_hello(descriptors: list[int]) -> None:
    """Writes its process id, whether numpy was there already, and its niceness of mind: what it was handed."""
    os.write(descriptors[0], f"{os.getpid()} {'numpy' in sys.modules} {len(descriptors)}".encode())


def count_frozen(descriptors: list[int]) -> None:
    """Writes how many objects no garbage collection goes through, and whether one goes through numpy."""
    numpy = sys.modules["numpy"]
    os.write(descriptors[0], f"{gc.get_freeze_count()} {any(each is numpy for each in gc.get_objects())}".encode())


def ask_for_gpus(descriptors: list[int]) -> None:
    """Writes its process id once torch has asked CUDA's driver for GPUs."""
    import torch

    torch.cuda.is_available()
    os.write(descriptors[0], str(os.getpid()).encode())


def sleep(descriptors: list[int]) -> None:
    os.write(descriptors[0], b"awake")
    time.sleep(600)


def fail(descriptors: list[int]) -> None:
    raise SystemExit(7)


def echo(spec: Any, context: RankContext) -> None:
    """Asks what it is told to ask, and hands back what it got."""
    answers = [context.call(method, *arguments) for method, *arguments in spec]
    contents = {name: bytes(view) for name, view in context.files.items()}
    context.call("report", context.rank, context.world_size, context.attempt, context.place, answers, contents)


def beat(spec: Any, context: RankContext) -> None:
    """Beats, and hands back the answers."""
    context.call("report", tuple(context.call("beat", each) for each in spec))


def die_in_a_beat(spec: Any, context: RankContext) -> None:
    threading.Thread(target=context.call, args=("beat", spec), daemon=True).start()
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def raise_key_error(spec: Any, context: RankContext) -> None:
    def look_up(table: dict[str, int]) -> int:
        return table["learning rate"]

    look_up({})


def raise_it(spec: Any, context: RankContext) -> None:
    """The exception that it is handed."""
    raise spec


def raise_what_the_coordinator_raised(spec: Any, context: RankContext) -> None:
    context.call("refuse", spec)


def hang_in_python(spec: Any, context: RankContext) -> None:
    context.call("here", os.getpid())
    time.sleep(600)


def hang_in_c(spec: Any, context: RankContext) -> None:
    """Holds the interpreter in a C function: no other Python thread runs."""
    context.call("here", os.getpid())
    re.match("(a+)+$", "a" * 60 + "b")  # 2^60 ways to try


def stop(spec: Any, context: RankContext) -> None:
    context.call("here", os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def join(spec: Any, context: RankContext) -> None:
    """Forms a group and adds the ranks up."""
    import torch
    import torch.distributed as dist

    context.join_group(60.0)
    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    context.call("report", context.rank, float(total))


def join_and_publish(spec: Any, context: RankContext) -> None:
    """Forms a group, and rank 0 tells the sum and what file it was handed."""
    import torch
    import torch.distributed as dist

    context.join_group(60.0)
    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    if context.rank == 0:
        context.call("publish", context.attempt, "total", (float(total), bytes(context.files["a"]).decode()))


def say_where(descriptors: list[int]) -> None:
    print(os.environ.get("OF_ITS_USER"), os.getcwd(), flush=True)
    print("and a word on standard error", file=sys.stderr)

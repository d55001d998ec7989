"""Runs an iterator ahead in a thread of its own; for batches on a GPU, also on a CUDA stream of its own.

Called by the loader, which decides what the items are and what a wait for them means.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

import torch

from dataio.batch import Batch

T = TypeVar("T")
Block = Sequence[tuple[Batch, ...]]
"""Consecutive steps; each has a batch for each virtual rank."""

STEPS_AHEAD = 2
"""Steps, or blocks of steps, made in advance."""
IDLE_SECONDS = 1.0
"""How often a consumer that waits says so."""


def run_ahead(
    items: Iterator[T],
    *,
    depth: int,
    name: str,
    on_wait: Callable[[float], None],
    on_idle: Callable[[], None] = lambda: None,
    on_close: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """Yields the same items, made by a thread that keeps at most `depth` of them ready.

    An exception from `items` is raised here, after the items before it; `on_wait` gets the seconds waited for each item, and `on_idle` is
    called every IDLE_SECONDS of a longer wait. The thread ends with the items, or when this generator is closed: then `on_close` wakes
    whatever the thread waits for, and `on_end` runs after it ended.
    """
    ready: deque[T] = deque()
    changed = threading.Condition()
    closed = ended = False
    failure: BaseException | None = None

    def work() -> None:
        nonlocal ended, failure
        try:
            while True:
                with changed:
                    changed.wait_for(lambda: closed or len(ready) < depth)
                    if closed:
                        return
                item = next(items)
                with changed:
                    ready.append(item)
                    changed.notify_all()
        except StopIteration:
            pass
        except BaseException as error:
            failure = error
        finally:
            with changed:
                ended = True
                changed.notify_all()

    # A daemon thread, so that an iterator that nobody closed does not keep the process from exiting.
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        while True:
            asked = time.perf_counter()
            with changed:
                while not changed.wait_for(lambda: ready or ended, IDLE_SECONDS):
                    on_idle()
                item = ready.popleft() if ready else None
                changed.notify_all()
            on_wait(time.perf_counter() - asked)
            if item is None:
                break
            yield item
        if failure is not None:
            raise failure
    finally:
        with changed:
            closed = True
            changed.notify_all()
        on_close()
        thread.join()
        on_end()


def batches_ahead(
    blocks: Iterator[Block],
    *,
    side: torch.cuda.Stream | None,
    name: str,
    on_wait: Callable[[float], None],
    on_idle: Callable[[], None],
    on_close: Callable[[], None],
    on_end: Callable[[], None],
) -> Generator[tuple[Batch, ...], None, None]:
    """Yields the steps of `blocks`, made STEPS_AHEAD blocks ahead. On a GPU they are made on the stream `side`, and the consumer's stream
    waits for its events."""
    if side is None:
        made = run_ahead(blocks, depth=STEPS_AHEAD, name=name, on_wait=on_wait, on_idle=on_idle, on_close=on_close, on_end=on_end)
        with closing(made) as ready:
            for block in ready:
                yield from block
        return
    side.wait_stream(torch.cuda.current_stream(side.device))  # for what is on its way to the device already: decoded samples
    aside = _on_stream(blocks, side)
    made_aside = run_ahead(aside, depth=STEPS_AHEAD, name=name, on_wait=on_wait, on_idle=on_idle, on_close=on_close, on_end=on_end)
    with closing(made_aside) as ready_aside:
        for block, event in ready_aside:
            stream = torch.cuda.current_stream(side.device)
            stream.wait_event(event)
            for batches in block:
                for batch in batches:
                    batch.samples.record_stream(stream)
                    for target in batch.targets.values():
                        target.record_stream(stream)
            yield from block


def _on_stream(blocks: Iterator[Block], side: torch.cuda.Stream) -> Iterator[tuple[Block, torch.cuda.Event]]:
    while True:
        with torch.cuda.device(side.device), torch.cuda.stream(side):
            block = next(blocks, None)
            if block is None:
                return
            event = side.record_event()
        yield block, event

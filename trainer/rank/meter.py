"""One rank's step metrics for Prometheus: `Meter` sees every step, and `Split` gets the parts of a step from the step itself. observers.py
makes the Meter; worker.py shows it the steps.

cluster.metrics defines names and meanings. device_metrics.py exports the GPU's own readings, profile.py counts the work of a step. Inside a
step this file reads the clock and adds up, and never waits for the device. Work that takes more than microseconds runs every SLOW_SECONDS.
"""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from cluster.metrics import Metrics
from dataio.loader import Tokens
from trainer.learn.step import StepStats
from trainer.rank.history import Speed
from trainer.rank.profile import FlopCount

SLOW_SECONDS = 2.0
"""Interval between two updates of the metrics that not every step needs: memory, reads, the gradient's norm."""


_log = logging.getLogger(__name__)


class Reads(Protocol):
    """A loader's counters (dataio.loader.Loader)."""

    @property
    def decode_seconds(self) -> float: ...
    @property
    def memory_held_bytes(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def read_wait_seconds(self) -> float: ...
    @property
    def tokens(self) -> Tokens: ...


class Split:
    """Adds up how long steps spend in forward and backward, and in the update after them. StepObserver.part calls `mark`.

    On a GPU these are the device's times: events go into its stream and are read steps later, when the device has passed them. A step
    records at most six: the hand-over of its batch, the start of the forward pass, and the ends of the newest gradients (DDP), backward
    pass, reduction and optimiser."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.forward_backward_seconds = self.optimizer_seconds = 0.0
        self.own_seconds = 0.0
        """On a GPU: the device's work on steps and its waits for batches, without its waits for other ranks. 0 on a CPU, where the host's
        clock shows that."""
        self._is_cuda, self._clock = device.type == "cuda", clock
        self._begin = self._backward = self._reduced = 0.0
        self._open: dict[str, Any] = {}  # part -> event of the step that is being queued
        self._parts: set[str] = set()  # parts that this step has marked
        self._queued: deque[tuple[dict[str, Any], set[str]]] = deque()  # steps whose events the device may not have passed
        self._free: list[dict[str, Any]] = []

    def mark(self, part: str) -> None:
        """Mark the end of `part` of a step, in the order of the device's work."""
        if self._is_cuda:
            self._record(part)
        elif part == "data":
            self._begin, self._backward, self._reduced = self._clock(), 0.0, 0.0
        elif part == "backward":
            self._backward = self._clock()
        elif part == "reduction":
            self._reduced = self._clock()
        elif part == "optimizer" and self._backward:
            self.forward_backward_seconds += self._backward - self._begin
            self.optimizer_seconds += self._clock() - max(self._reduced, self._backward)

    def _record(self, part: str) -> None:
        if part == "other":
            self._collect()
            self._open, self._parts = self._free.pop() if self._free else {}, set()
        if part == "forward":
            return
        if part not in self._open:
            self._open[part] = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._open[part].record()  # recording an event again, as for backward, keeps the newest time
        self._parts.add(part)
        if part == "optimizer" and "backward" in self._parts:
            self._queued.append((self._open, self._parts))

    def _collect(self) -> None:
        """Add up the steps that the device has finished."""
        while self._queued and self._queued[0][0]["optimizer"].query():
            events, parts = self._queued.popleft()
            gradients = events["gradients" if "gradients" in parts else "backward"]  # after it, DDP's backward pass waits for other ranks
            reduced = events["reduction" if "reduction" in parts else "backward"]
            self.forward_backward_seconds += events["data"].elapsed_time(gradients) / 1e3
            optimizer_seconds = reduced.elapsed_time(events["optimizer"]) / 1e3
            self.optimizer_seconds += optimizer_seconds
            self.own_seconds += events["other"].elapsed_time(gradients) / 1e3 + optimizer_seconds
            self._free.append(events)


class Meter:
    """Call `begin` before the first step of each phase, and `stepped` after each step. It provides two methods of a StepObserver: `mark`
    (for `part`) and `takes_norm`."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        device: torch.device,
        share: float,
        steps_per_epoch: int,
        planned_steps: int,
        waits_in_backward: bool,
        peak_flops_per_second: float | None,
        reads: Reads,
        speed: Speed,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`share`: fraction of a batch that this rank carries. `waits_in_backward`: the rank waits for other ranks inside the backward pass
        (DDP on a CPU) instead of after it. `peak_flops_per_second`: the device's peak, if known. `speed` sees each step before this meter
        does."""
        self._metrics, self._device, self._reads, self._speed, self._clock = metrics, device, reads, speed, clock
        self._share, self._steps_per_epoch, self._waits_in_backward = share, steps_per_epoch, waits_in_backward
        self._split = Split(device)
        self._takes_norm = True
        self._left_seconds = 0.0  # below 0: waits of a GPU in earlier steps, of which the host's seconds have yet to come
        self._told = [0.0, 0.0]  # the split's seconds that Prometheus already has
        self._reads_told: dict[str, float] = {}
        self._slow_at = -math.inf
        self._counting: threading.Thread | None = None
        self.peak_flops_per_second = peak_flops_per_second
        self.flops_per_image: float | None = None
        """FLOPs of forward and backward."""
        self.mark = self._split.mark
        """Marks the end of a part of a step, in the order of the device's work."""
        metrics.set("planned_steps", planned_steps)

    @property
    def device_seconds(self) -> float | None:
        """A GPU's own work on the steps so far that it has told of, without its waits for other ranks. None on a CPU."""
        return self._split.own_seconds if self._device.type == "cuda" else None

    def begin(self) -> None:
        """The next steps train other parameters, so their work differs: forget the count."""
        if self.flops_per_image is not None:
            self.flops_per_image = None
            self._metrics.unset("mfu_ratio")
        self._takes_norm = True

    def takes_norm(self) -> bool:
        """Whether the asking step should compute its gradient's norm: one step every SLOW_SECONDS."""
        takes, self._takes_norm = self._takes_norm, False
        return takes

    def measured(self, *, peak_flops_per_second: float, flops_per_image: float | None) -> None:
        """Take the values that a profile found before the steps. A peak from a data sheet stays."""
        if self.peak_flops_per_second is None:
            self.peak_flops_per_second = peak_flops_per_second
        self.flops_per_image = flops_per_image

    def count_flops(self, flops: FlopCount, image_hw: tuple[int, int], precision: str) -> None:
        """Find `flops_per_image` in a thread during the first steps. It takes some tenths of a second; no restart should wait for it."""

        def count() -> None:
            self.flops_per_image = flops.count(image_hw, precision=precision)
            if self.flops_per_image is None:
                _log.info("mfu_ratio is left out: the model cannot be counted")

        self._counting = threading.Thread(target=count, name="flops", daemon=True)

    def close(self) -> None:
        if self._counting is not None and self._counting.is_alive():
            self._counting.join(10.0)

    def stepped(self, stats: StepStats) -> None:
        metrics, split, exchange_seconds = self._metrics, self._split, stats.exchange_seconds
        metrics.add("steps_total")
        metrics.add("samples_total", stats.samples * self._share)
        metrics.add("data_wait_seconds_total", stats.data_wait_seconds)
        metrics.add("reduce_seconds_total", exchange_seconds)
        left = self._left_seconds + stats.step_seconds - stats.data_wait_seconds - exchange_seconds
        metrics.add("compute_seconds_total", max(0.0, left))
        self._left_seconds = min(0.0, left)
        forward_backward, optimizer = split.forward_backward_seconds, split.optimizer_seconds
        inside = exchange_seconds if self._waits_in_backward else 0.0
        metrics.add("forward_backward_seconds_total", max(0.0, forward_backward - self._told[0] - inside))
        metrics.add("optimizer_seconds_total", optimizer - self._told[1])
        self._told = [forward_backward, optimizer]
        metrics.observe("step_seconds", stats.step_seconds)
        metrics.set("step", stats.steps_done)
        metrics.set("epoch", stats.steps_done / self._steps_per_epoch)
        metrics.set("learning_rate", stats.learning_rate)
        images_per_second = self._speed.images_per_second * self._share
        metrics.set("images_per_second", images_per_second)
        if self.peak_flops_per_second is not None and self.flops_per_image is not None:
            metrics.set("mfu_ratio", images_per_second * self.flops_per_image / self.peak_flops_per_second)
        if stats.losses:
            metrics.set("loss", stats.losses[-1][1])
        if stats.gradient_norms:
            metrics.set("gradient_norm", stats.gradient_norms[-1])
        now = self._clock()
        if now - self._slow_at >= SLOW_SECONDS:
            if self._counting is not None and self._counting.ident is None:
                self._counting.start()  # after the first step, which is slow already
            self._slow_at = now
            self.look()

    def look(self) -> None:
        """Update the metrics that are read every few seconds."""
        metrics, reads = self._metrics, self._reads
        self._takes_norm = True
        metrics.set("host_memory_bytes", resident_bytes())
        metrics.set("loader_memory_bytes", reads.memory_held_bytes)
        if self._device.type == "cuda":
            metrics.set("device_memory_bytes", torch.cuda.max_memory_allocated(self._device))
        totals = {
            "read_bytes_total": float(reads.bytes_read),
            "read_wait_seconds_total": reads.read_wait_seconds,
            "decode_seconds_total": reads.decode_seconds,
            "tokens_total": float(reads.tokens.given),
            "padded_tokens_total": float(reads.tokens.padded),
        }
        for name, total in totals.items():
            metrics.add(name, max(0.0, total - self._reads_told.get(name, 0.0)))
        self._reads_told = totals


def resident_bytes() -> int:
    """Resident memory of this process on the host, including pages shared with the process it was forked from."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

"""A rank that decodes its data into the cache, however long that takes, is seen to get on. Real data, decoder, heartbeat and hang watch."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cluster.beat import DECODING, BeatReply
from cluster.hang import Hang, HangWatch, Sign
from cluster.heartbeat import Heartbeat
from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.order import Order
from dataio.parquet import open_dataset
from tests.trainer.report_runs import SAMPLE
from trainer.rank.data import fill_cache

DATASET = open_dataset(SAMPLE)
GROUPS = sum(DATASET.split(split).groups for split in ("train", "test"))


def loader_of(cache: Any) -> Loader:
    order = Order(
        seed=0, fingerprint=DATASET.manifest.fingerprint, count=DATASET.split("train").count, batch_size=20, virtual_ranks=1, window=0
    )
    return Loader(
        DATASET,
        DataConfig(cache=cache, batch_size=20),
        order=order,
        virtual_ranks=range(1),
        device=torch.device("cpu"),
        seed=0,
        on_bad=lambda bad: pytest.fail(str(bad)),
    )


class Ticks(Heartbeat):
    """A heartbeat that calls `on_tick` after each tick."""

    def __init__(self, on_tick: Callable[["Ticks"], None]) -> None:
        self.on_tick = on_tick
        super().__init__(lambda beat: BeatReply(stop_at=None, confirmed=False), 0, 1, 60.0, start_step=0)

    def tick(self, phase: str | None = None) -> None:
        super().tick(phase)
        self.on_tick(self)

    def sign(self) -> Sign:
        return Sign(state="R", age_seconds=0.1, ticks=self._ticks, phase=self.phase)


@pytest.fixture
def clock() -> Iterator["Clock"]:
    clock = Clock()
    yield clock
    clock.heartbeat.close()


class Clock:
    """Each tick stands for a row group that took nearly as long as a start may."""

    def __init__(self) -> None:
        self.watch, self.now = HangWatch(hang_seconds=60.0, start_seconds=600.0, now=0.0), 0.0
        self.hangs: list[Hang] = []
        self.phases: list[str] = []
        self.heartbeat = Ticks(self.passes)

    def passes(self, heartbeat: Ticks) -> None:
        self.phases.append(heartbeat.phase)
        for _ in range(590):
            self.now += 1.0
            if (hang := self.watch.look(self.now, {0: heartbeat.sign()})) is not None:
                self.hangs.append(hang)


def test_decoding_into_the_cache_may_take_hours_as_each_row_group_is_a_sign_of_life(clock: Clock) -> None:
    loader = loader_of("host")
    fill_cache(clock.heartbeat, loader)
    assert clock.phases == [DECODING] * (1 + GROUPS)
    assert clock.now > 1.5 * 600
    assert clock.hangs == []


def test_without_a_cache_nothing_is_decoded_in_advance(clock: Clock) -> None:
    loader = loader_of("none")
    fill_cache(clock.heartbeat, loader)
    assert clock.phases == [DECODING]

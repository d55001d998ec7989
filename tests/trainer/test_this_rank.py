"""Claims about how a rank joins the others."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from cluster.beat import BeatReply
from cluster.rank import Placement
from trainer.rank.this_rank import join
from trainer.settings.tree import RunConfig

PLACE = Placement(host="here", address="127.0.0.1", node_id="n", local_rank=0, local_world_size=2, device_index=None)


@dataclass
class Context:
    """As much of a RankContext as joining needs."""

    rank: int = 0
    world_size: int = 2
    place: Placement = PLACE
    files: dict[str, memoryview] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)

    def call(self, method: str, *arguments: Any) -> Any:
        return BeatReply(stop_at=None, confirmed=False) if method == "beat" else None

    def join_group(self, join_seconds: float) -> None:
        self.waits.append(join_seconds)


def test_a_rank_waits_for_the_others_longer_than_a_start_may_take_so_that_the_driver_names_who_is_late() -> None:
    for seconds in (5.0, 600.0, 7200.0):
        config = RunConfig(run="r", cluster=replace(RunConfig().cluster, start_seconds=seconds))
        context = Context()
        me = join(SimpleNamespace(config=config, attempt=1, resume=None), context)  # type: ignore[arg-type]
        me.heartbeat.close()
        me.server.close()
        (waited,) = context.waits
        assert seconds < waited <= seconds + 60

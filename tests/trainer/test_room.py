"""Claims about the room that a driver sees, waits for and asks for, on a cluster of numbers: no Ray, no clock."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import demand
from cluster.config import ClusterConfig
from cluster.coordinator import Status
from cluster.launch import ClusterHardware, plan_resources
from trainer.drive import fleets
from trainer.drive.fleets import SETTLE_SECONDS, Fleets, Pause, Room
from trainer.drive.notices import MOST_PAUSES, Answer, Notices
from trainer.drive.signals import Signals
from trainer.settings.tree import RunConfig

GROW_AFTER = 30.0


@dataclass
class Group:
    bundles: list[dict[str, float]]
    nodes: list[int] | None = None


@dataclass
class Cluster:
    """Nodes by their free CPUs, and placement groups as Ray places them: the oldest first, each wholly or not at all."""

    free: list[float]
    total: list[float] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    now: float = 1000.0
    coming: dict[float, Callable[[], None]] = field(default_factory=dict)
    notices: set[str] = field(default_factory=set)
    """Names of nodes with a notice of preemption; a node's name is its number."""

    def but(self, cpus: list[float], avoided: Collection[str]) -> list[dict[str, float]]:
        return [{"CPU": each} for number, each in enumerate(cpus) if str(number) not in avoided]

    def __post_init__(self) -> None:
        self.total = self.total or list(self.free)

    def add_node(self, cpus: float) -> None:
        self.free.append(cpus)
        self.total.append(cpus)
        self.place()

    def place(self) -> None:
        for group in self.groups:
            if group.nodes is None:
                free, nodes = list(self.free), []
                for bundle in group.bundles:
                    fits = [node for node, cpus in enumerate(free) if cpus >= bundle["CPU"]]
                    if not fits:
                        break
                    nodes.append(fits[0])
                    free[fits[0]] -= bundle["CPU"]
                else:
                    self.free, group.nodes = free, nodes

    def make(self, bundles: list[dict[str, float]]) -> Group:
        self.groups.append(Group(bundles))
        self.place()
        return self.groups[-1]

    def table(self, group: Group) -> dict[str, str]:
        return {"state": "PENDING" if group.nodes is None else "CREATED"}

    def remove(self, group: Group) -> None:
        self.groups = [one for one in self.groups if one is not group]
        for node, bundle in zip(group.nodes or [], group.bundles, strict=False):
            self.free[node] += bundle["CPU"]
        self.place()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.coming if when <= self.now]:
            self.coming.pop(when)()

    def waiting(self) -> list[int]:
        """The sizes of the groups that an autoscaler sees."""
        return [len(group.bundles) for group in self.groups if group.nodes is None]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster([])
    monkeypatch.setattr(demand, "placement_group", lambda bundles: cluster.make(bundles))
    monkeypatch.setattr(demand, "placement_group_table", lambda group: cluster.table(group))
    monkeypatch.setattr(demand, "remove_placement_group", lambda group: cluster.remove(group))
    monkeypatch.setattr(fleets, "free_resources", lambda avoided: cluster.but(cluster.free, avoided))
    monkeypatch.setattr(fleets, "total_resources", lambda avoided: cluster.but(cluster.total, avoided))
    monkeypatch.setattr(fleets, "nodes_with_file", lambda path, nodes: {node for node in nodes if node in cluster.notices})
    monkeypatch.setattr(fleets, "draining_nodes", dict)
    for module in (fleets, demand):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: cluster.now, sleep=cluster.sleep))
    return cluster


class Driver:
    """No run behind it: only what looks at the cluster."""

    def __init__(self, workers: str, *, is_local: bool = False, at_work: int = 0) -> None:
        settings = ClusterConfig(cpus_per_worker=1)
        resources = plan_resources(workers, settings, ClusterHardware(local=is_local, nodes=1, cpus=64, gpus=0))
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.shown: list[str] = []
        self.said: list[str] = []
        self.at_work = at_work
        self.room = Room(
            resources,
            may_ask=not is_local and resources.fewest < resources.most,
            placement_seconds=100,
            grow_after_seconds=GROW_AFTER,
            tell=lambda event, **fields: self.told.append((event, fields)),
            say=self.said.append,
        )

    def wait_for_room(self) -> int | None:
        return self.room.wait(is_stopping=lambda: False, show=self.shown.append)

    def looks(self, cluster: Cluster, seconds: float) -> Pause | None:
        """As an attempt does while the ranks train."""
        end = cluster.now + seconds
        while cluster.now < end:
            cluster.sleep(0.25)
            if (pause := self.room.reason_to_pause(NOTHING, workers=self.at_work, attempt=1)) is not None:
                return pause
        return None


NOTHING: Any = SimpleNamespace(reports={})
assert "reports" in dir(Status)

# Waiting for the fewest


def test_a_run_that_waits_asks_for_the_fewest_in_one_group_and_gives_it_back_when_it_has_found_its_place(cluster: Cluster) -> None:
    driver = Driver("2:4")
    cluster.add_node(1)
    cluster.coming = {1020.0: lambda: cluster.add_node(1), 1010.0: lambda: seen.append(cluster.waiting())}
    seen: list[list[int]] = []
    assert driver.wait_for_room() == 2
    assert seen == [[2]]
    assert set(driver.shown) == {"waiting for room for 2 workers, there is for 1"}
    assert cluster.groups == []
    assert cluster.free == [1, 1]


def test_room_that_came_is_counted_once_though_ray_says_late_what_is_free(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("1:4")
    said = [(0.0, [0.0])]  # (when, CPUs free)

    def late(avoided: Collection[str]) -> list[dict[str, float]]:
        said.append((cluster.now, list(cluster.free)))
        return [{"CPU": cpus} for cpus in [free for when, free in said if when <= cluster.now - 0.3][-1]]

    monkeypatch.setattr(fleets, "free_resources", late)
    cluster.coming = {1010.0: lambda: (cluster.add_node(2), said.append((cluster.now - 0.3, [2.0])))}
    assert driver.wait_for_room() == 2
    assert cluster.free == [2]


def test_what_the_fleet_before_gives_back_is_not_asked_for(cluster: Cluster) -> None:
    driver = Driver("1:4")
    cluster.free, cluster.total = [0.0], [4.0]
    made: list[int] = []
    cluster.coming = {1000 + SETTLE_SECONDS - 0.5: lambda: made.append(len(cluster.groups)) or cluster.free.__setitem__(0, 4.0)}
    assert driver.wait_for_room() == 4
    assert made == [0]
    assert cluster.groups == []


def test_of_two_runs_that_wait_for_two_each_one_gets_both_nodes(cluster: Cluster) -> None:
    first, second = Driver("2:4"), Driver("2:4")
    second.room._demand.state(1, workers_each=2)
    cluster.coming = {1010.0: lambda: cluster.add_node(1), 1020.0: lambda: cluster.add_node(1)}
    assert first.wait_for_room() is None  # the other's are placed
    assert second.room._demand.is_placed()
    second.room._demand.withdraw()
    assert first.wait_for_room() == 2


def test_without_room_in_time_nothing_is_left_waiting(cluster: Cluster) -> None:
    driver = Driver("2:4")
    cluster.add_node(1)
    assert driver.wait_for_room() is None
    assert cluster.now > 1100
    assert cluster.groups == []


# At work with fewer than there may be


def test_each_lacking_worker_is_a_group_and_what_comes_is_taken_after_it_was_free_for_a_while(cluster: Cluster) -> None:
    driver = Driver("1:4", at_work=1)
    cluster.add_node(0)
    assert driver.looks(cluster, 10) is None
    assert cluster.waiting() == [1, 1, 1]
    assert driver.told == [("workers_asked_for", {"attempt": 1, "workers": 3})]
    cluster.add_node(2)  # room for two of the three
    assert cluster.free == [0, 0]
    came = cluster.now
    pause = driver.looks(cluster, 60)
    assert pause is not None
    assert pause.kind == "grow"
    assert "room for 3 workers, 1 are at work" in pause.reason
    assert GROW_AFTER < cluster.now - came < GROW_AFTER + 5
    assert (cluster.groups, cluster.free) == ([], [0, 2])


def test_room_that_a_restarting_neighbour_left_is_free_again_before_it_has_to_ask_for_more(cluster: Cluster) -> None:
    driver = Driver("1:2", at_work=1)
    cluster.add_node(0)
    driver.looks(cluster, 5)
    cluster.free[0] = 1.0  # its fleet ended
    cluster.place()
    assert cluster.free == [0]
    driver.looks(cluster, fleets.CLUSTER_POLL_SECONDS + 0.25)
    assert cluster.free == [1]
    cluster.free[0] = 0.0  # and the next one is there
    assert driver.looks(cluster, 2 * GROW_AFTER) is None
    assert cluster.waiting() == [1]
    assert len(driver.told) == 1  # one line for one lack


@pytest.mark.parametrize(("workers", "is_local", "at_work"), [("2", False, 2), ("1:4", True, 1), ("1:4", False, 4)])
def test_nothing_is_asked_for_by_a_fixed_number_a_local_ray_or_a_full_fleet(
    cluster: Cluster, workers: str, is_local: bool, at_work: int
) -> None:
    driver = Driver(workers, is_local=is_local, at_work=at_work)
    assert driver.looks(cluster, 10) is None
    if is_local:
        assert driver.wait_for_room() is None
    assert cluster.groups == []
    assert driver.told == []


def test_a_fleet_that_ends_or_dies_leaves_nothing_that_would_take_its_room(cluster: Cluster) -> None:
    driver = Driver("1:4", at_work=1)
    several: Any = SimpleNamespace(resources=SimpleNamespace(workers=1))
    present = Fleets(several, driver.room, Signals())
    driver.looks(cluster, 5)
    assert cluster.waiting() == [1, 1, 1]
    present.end()
    assert cluster.groups == []
    driver.looks(cluster, 5)
    assert cluster.waiting() == [1, 1, 1]
    present.died()
    assert cluster.groups == []


def test_a_run_that_is_to_stop_waits_for_no_room(cluster: Cluster) -> None:
    driver = Driver("2:4")
    began = cluster.now
    assert driver.room.wait(is_stopping=lambda: cluster.now > began + 1, show=driver.shown.append) is None
    assert cluster.now < began + 2
    assert cluster.groups == []


@pytest.mark.parametrize("draining", [{}, {"ours": 0.0}, {"another": 0.0}])
def test_a_notice_of_preemption_and_a_node_of_ours_that_ray_drains_are_reasons_to_pause(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, draining: dict[str, float]
) -> None:
    monkeypatch.setattr(fleets, "draining_nodes", lambda: draining)
    driver = Driver("2", at_work=2)
    told = agents(ours="a file said so")
    assert driver.room.reason_to_pause(told, workers=2, attempt=1) == Pause(kind="preempted", reason="notice of preemption: a file said so")
    pause = driver.room.reason_to_pause(agents(ours=""), workers=2, attempt=1)
    assert pause == (Pause(kind="preempted", reason="Ray drains node ours") if "ours" in draining else None)


# Notices that stay


def agents(**notices: str) -> Any:
    """A status with an agent on each of these nodes; "n0" is node 0."""
    reports = {rank: SimpleNamespace(node_id=node.removeprefix("n"), notice=notice) for rank, (node, notice) in enumerate(notices.items())}
    return SimpleNamespace(reports=reports)


def test_a_notice_that_stays_moves_the_run_to_another_node_once_and_for_good(cluster: Cluster) -> None:
    """Nothing is placed there again while it stands, and room there is no reason to grow."""
    driver = Driver("1:2", at_work=1)
    cluster.add_node(1)
    cluster.add_node(1)
    cluster.notices = {"0"}
    pause = driver.room.reason_to_pause(agents(n0="notice on zero"), workers=1, attempt=1)
    assert pause == Pause(kind="preempted", reason="notice of preemption: notice on zero")
    assert driver.wait_for_room() == 1
    assert driver.room.avoided == {"0"}
    driver.room.taken()
    cluster.free[1] = 0.0  # taken by this run, and node 0 is free
    for _ in range(100):
        cluster.sleep(3)
        assert driver.room.reason_to_pause(agents(n1=""), workers=1, attempt=2) is None
    assert [event for event, _ in driver.told if event != "workers_asked_for"] == []
    cluster.notices = set()  # taken back: it may grow there again, once somebody has looked
    pauses = []
    for _ in range(60):
        cluster.sleep(3)
        pauses.append(driver.room.reason_to_pause(agents(n1=""), workers=1, attempt=2))
    assert any(pause is not None and pause.kind == "grow" for pause in pauses)


@pytest.mark.parametrize("workers", ["1", "1:2"])
def test_a_run_with_nowhere_else_to_go_saves_once_and_trains_on_with_one_warning(cluster: Cluster, workers: str) -> None:
    driver = Driver(workers, at_work=1)
    cluster.add_node(1)
    cluster.notices = {"0"}
    noticed = agents(n0="notice on zero")
    assert driver.room.reason_to_pause(noticed, workers=1, attempt=1) is not None
    if workers == "1":
        driver.room.choose_nodes(1)
    else:
        assert driver.wait_for_room() == 1
    driver.room.taken()
    assert driver.room.avoided == frozenset()
    for _ in range(100):
        cluster.sleep(3)
        assert driver.room.reason_to_pause(noticed, workers=1, attempt=2) is None
    told = [fields for event, fields in driver.told if event == "notice_stands"]
    assert told == [{"attempt": 2, "nodes": ["0"], "reason": "notice on zero"}]
    assert len(driver.said) == 1
    assert "no room elsewhere" in driver.said[0]


def test_a_fixed_number_of_workers_moves_too_where_all_of_them_fit(cluster: Cluster) -> None:
    driver = Driver("2", at_work=2)
    for _ in range(2):
        cluster.add_node(2)
    cluster.free = [2.0, 0.5]
    cluster.coming = {cluster.now + 1: lambda: cluster.free.__setitem__(1, 2.0)}  # what the fleet before gives back
    cluster.notices = {"0"}
    assert driver.room.reason_to_pause(agents(n0="notice"), workers=2, attempt=1) is not None
    driver.room.choose_nodes(2)
    assert driver.room.avoided == {"0"}


@pytest.mark.parametrize("workers", ["1", "1:2"])
def test_a_fleet_is_started_away_from_the_nodes_that_the_run_leaves(
    cluster: Cluster, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(workers, at_work=1)
    for _ in range(2):
        cluster.add_node(1)
    cluster.notices = {"0"}
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(fleets, "Fleet", lambda *_, **settings: started.append(settings))
    session: Any = SimpleNamespace(
        resources=driver.room._resources, config=RunConfig(run="run"), coordinator=None, zygote="", order=lambda *_: None
    )
    runs = Fleets(session, driver.room, Signals())
    assert runs.start(1, show=driver.shown.append) is None
    assert driver.room.reason_to_pause(agents(n0="notice"), workers=1, attempt=1) is not None
    runs.end()
    assert runs.start(2, show=driver.shown.append) is None
    assert [settings["avoid"] for settings in started] == [frozenset(), {"0"}]


def test_to_leave_is_said_until_the_fleet_has_ended() -> None:
    """Something graver may come between: a hang, a dead rank."""
    notices = Notices()
    first = notices.hear({"a": "going", "b": ""})
    assert first == Answer(act="leave", nodes=("a",), reason="going")
    assert notices.hear({"a": "going", "b": ""}) == first
    notices.moved()
    assert notices.hear({"b": ""}) is None
    assert notices.nodes == {"a"}
    assert notices.hear({"a": "going"}) == Answer(act="stay", nodes=("a",), reason="going")
    assert notices.hear({"a": "going"}) is None
    notices.keep([])
    assert notices.nodes == frozenset()


def test_a_hook_that_flaps_pauses_a_run_a_few_times_and_no_more() -> None:
    notices = Notices()
    acts = []
    for _ in range(10):
        answer = notices.hear({"a": "going"})
        acts.append(answer.act if answer is not None else None)
        notices.moved()
        notices.hear({"a": ""})
        assert notices.nodes == frozenset()
    assert acts == ["leave"] * MOST_PAUSES + ["stay"] * (10 - MOST_PAUSES)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from(["", "going", "gone"])), max_size=40))
def test_whatever_nodes_say_the_pauses_are_bounded_and_no_standing_notice_is_forgotten(said: list[dict[str, str]]) -> None:
    notices = Notices()
    pauses = 0
    for now in said:
        answer = notices.hear(now)
        standing = {node for node, text in now.items() if text}
        assert standing <= notices.nodes
        if answer is not None:
            assert set(answer.nodes) <= standing
            if answer.act == "leave":
                pauses += 1
                notices.moved()
        assert (again := notices.hear(now)) is None or again.act == "stay"
    assert pauses <= 3 * MOST_PAUSES

"""The driver's part of a run: fleets and attempts, progress, signals, and the end. Called by run.py, once everything is known and checked.

A fleet is a set of agents that Ray Train placed; an attempt is one life of the ranks below them. A rank that dies costs an attempt, and the
next begins on the same fleet, in seconds. A dead agent or node costs the fleet, and so does a change of the number of workers.
"""

import contextlib
import json
import math
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

import ray
from rich.console import Console

from cluster.agent import Payload, poll_seconds
from cluster.controller import RunFailed, run_attempts
from cluster.coordinator import FILE_SD, Status
from cluster.demand import Demand, groups_wanted, room_of_worker
from cluster.failures import Failure, History, history_of
from cluster.hang import STARTING, Hang, HangWatch, Sign
from cluster.interval import observed_failures
from cluster.journal import Journal, last_attempt, read_journal
from cluster.launch import (
    Fleet,
    Resources,
    draining_nodes,
    failure_of_ranks,
    free_resources,
    remove_placement_group,
    start_coordinator,
    total_resources,
    workers_that_fit,
)
from cluster.redact import redact, redacted
from cluster.storage import Storage
from cluster.store import Commit, Store
from cluster.versions import versions
from dataio.parquet import Dataset
from trainer.runs.progress import ProgressLine, RunState, final_table, predict_command
from trainer.runs.summary import ACCOUNTED, accounting, summarise
from trainer.settings.spec import RANK_MODULES, TARGET, WorkerSpec, make_order, total_steps_of
from trainer.settings.tree import RunConfig

# On a rank; where in the program they came up helps nobody.
SAYS_IT_ALL = ("WeightsError:", "OSError:", "StorageFull:", "StorageOutage:", "StorageRefused:")
SAME_SIGNAL_SECONDS = 0.3
CHECKPOINT_WARNING_SECONDS = 60.0  # a disk that is full stays so for a while: one line, not one for each checkpoint
TAKEN_OVER_POLL_SECONDS = 5.0
CLUSTER_POLL_SECONDS = 2.0
ACCOUNT_SECONDS = 10.0
AGENT_SILENT_SECONDS = 5.0
SETTLE_SECONDS = 3.0
STACKS_SECONDS = 5.0
FLEET_END_SECONDS = 10.0


class _Pause(Exception):
    """This attempt is to end at a commit, and another to begin with other workers."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Drive:
    """Lives as long as one command."""

    def __init__(
        self,
        *,
        config: RunConfig,
        dataset: Dataset,
        location: str | Mapping[str, Any],
        storage: Storage,
        store: Store,
        journal: Journal,
        resources: Resources,
        command: str,
        console: Console,
        zygote: str,
        is_local: bool,
        find_start: Callable[[], Commit | None],
    ) -> None:
        """`find_start` finds the commit to go on from, and says which are damaged; `zygote` is the name of the nodes' zygotes;
        `is_local`: this Ray is the run's own."""
        self.config, self.dataset, self.location = config, dataset, location
        self.storage, self.store, self.journal = storage, store, journal
        self.resources, self.command, self.console = resources, command, console
        self.find_start, self.zygote = find_start, zygote
        self.steps_per_epoch = make_order(config, dataset).steps_per_epoch
        self.total_steps = total_steps_of(config, self.steps_per_epoch)
        self.signal, self.signal_at = 0, 0.0
        self.woken: SimpleQueue[None] = SimpleQueue()
        self.phase, self.phase_began = "", time.monotonic()
        self.failed_checkpoints, self.failure_told_at = 0, -math.inf
        self.result: dict[str, Any] | None = None
        self.restarts = 0
        self.start: Commit | None = None
        self.skip: frozenset[int] = frozenset()  # steps whose batches are left out
        self.number = 0  # of the newest attempt
        self.fleet: Fleet | None = None
        self.fleets = 0
        self.workers = resources.workers  # of the present fleet
        self.placement_group = ""
        self.room_since: float | None = None
        self.demand = Demand(room_of_worker(resources))
        self.may_ask = not is_local and resources.fewest < resources.most
        self.asked_for_workers = 0  # of the present fleet
        self.looked_at_cluster = self.accounted_at = 0.0
        self.waiting = ""
        self.generation = store.claim_generation()
        self.coordinator = start_coordinator(
            storage_uri=storage.uri,
            run=config.run,
            generation=self.generation,
            keep=config.cluster.keep_checkpoints,
            metrics_host=config.cluster.metrics_host,
            discovery_port=config.cluster.discovery_port,
            storage_retry_seconds=config.cluster.storage_retry_seconds,
            straggler=(config.cluster.faults.straggler_ratio, config.cluster.faults.straggler_steps),
        )

    def go(self, start: Commit | None) -> int:
        """The whole run; the exit status. `start` is the commit to go on from."""
        try:
            if self.resources.fewest == self.resources.most:
                self.start_fleet()  # Ray Train places the agents while the coordinator starts
            return self.go_from(start)
        finally:
            self.end_fleet()

    def go_from(self, start: Commit | None) -> int:
        if self.committed_step() > (start.step if start else 0):  # by a driver that was still at work when this one took over
            start = self.find_start()
        events = read_journal(self.storage, self.config.run)
        self.number, history = last_attempt(events), history_of(events)
        # An outage may have cost the journal its last lines; the commit has what counts.
        self.skip = history.skipped | frozenset(start.meta.get("skipped", ()) if start is not None else ())
        history = replace(history, skipped=self.skip, rollbacks=max(history.rollbacks, len(self.skip)))
        discovery = self.ask("discovery_address")
        file_sd = f", file_sd {self.storage.at(self.config.run)}/{FILE_SD}" if self.storage.is_local else ""
        self.console.print(f"Prometheus: http_sd http://{discovery}/sd{file_sd}", soft_wrap=True)
        if start is not None:
            self.journal.write("resumed", step=start.step, path=start.path)
            self.console.print(f"going on from step {start.step:,} of {self.total_steps:,}")
            before, now = start.meta["threads"], self.resources.threads_per_worker
            if before != now:
                self.console.print(
                    f"threads of a worker: {before} before, {now} now; the weights may differ in their last bits "
                    f"from an uninterrupted run's (--cluster.threads-per-worker {before} keeps them)"
                )
        self.start = start
        try:
            with ProgressLine(self.console) as self.line, self.signals():
                run_attempts(
                    self.attempt,
                    first_attempt=self.number + 1,
                    committed_step=self.committed_step,
                    policy=self.config.cluster.faults,
                    on_failure=self.on_failure,
                    on_skip=self.on_skip,
                    history=history,
                    stopping=lambda: self.signal != 0,
                )
        except RunFailed as error:
            return self.end_taken_over() if self.is_taken_over() else self.end_failed(error)
        except (OSError, ValueError):
            raise
        except Exception:
            traceback.print_exc()  # now: Ray, whose calls in other threads fail from here on, ends the process without it
            raise
        finally:
            self.end_fleet()  # before Ray goes: a thread that is inside it then takes the process down
        if (self.result is None or self.result["stopped"]) and self.is_taken_over():
            return self.end_taken_over()
        if self.result is None or self.result["stopped"]:
            return self.end_stopped()
        return self.end_finished()

    # Attempts

    def attempt(self, number: int) -> Failure | None:
        """Attempts until one fails, or the run is over; a change of the number of workers between two of them is no failure."""
        while True:
            self.number += 1
            self.result = None
            try:
                return self.one_attempt()
            except _Pause as pause:
                self.tell("attempt_paused", attempt=self.number, kind=pause.kind, reason=pause.reason, step=self.committed_step())
                self.end_fleet()
                self.go_back()

    def one_attempt(self) -> Failure | None:
        """One life of the ranks; why it failed, None when the run is over. _Pause when there are to be other workers."""
        if self.fleet is None:
            failure = self.start_fleet()
            if failure is not None or self.fleet is None:
                return failure
        fleet, number = self.fleet, self.number
        start_step = self.start.step if self.start else 0
        failures, observed_seconds = observed_failures(read_journal(self.storage, self.config.run))
        spec = WorkerSpec(
            config=self.config,
            dataset=self.location if isinstance(self.location, str) else None,
            generation=self.generation,
            attempt=number,
            resume=(self.start.step, self.start.generation) if self.start else None,
            threads=self.resources.threads_per_worker,
            skip=self.skip,
            failures=failures,
            observed_seconds=observed_seconds,
        )
        files = {} if isinstance(self.location, str) else self.location
        payload = Payload(target=TARGET, spec=pickle.dumps(spec), files=files)
        self.ask("start_attempt", number, fleet.workers, start_step, fleet.number, payload)
        cluster = self.config.cluster
        watch = HangWatch(hang_seconds=cluster.hang_seconds, start_seconds=cluster.start_seconds, now=time.monotonic())
        stop_asked_at: float | None = None
        pause: _Pause | None = None
        looked_at = time.monotonic()
        ended = 0
        while True:
            if fleet.wait(0):
                return self.fleet_died(fleet)
            status = self.wait_for_news(fleet, ended, is_told=stop_asked_at is not None)
            ended = len(status.ended_ranks)
            self.placement_group = next((r.placement_group for r in status.reports.values()), "") or self.placement_group
            if len(status.ended_ranks) == fleet.workers:
                break
            if status.is_orphan:
                self.ask("adopt", number, fleet.number, payload)
                self.tell("coordinator_restarted", attempt=number)
                self.line.message("the coordinator died and was started again; the ranks trained on")
                continue
            if silent := self.silent_agents(status):
                return self.agents_lost(silent, status)
            if hang := watch.look(time.monotonic(), signs(status)):
                return self.break_hang(hang, status)
            if time.monotonic() - looked_at > TAKEN_OVER_POLL_SECONDS:
                looked_at = time.monotonic()
                if self.is_taken_over():
                    self.end_fleet()
                    return None
            if self.signal and stop_asked_at is None:
                stop_asked_at = time.monotonic()
                name = signal.Signals(self.signal).name
                self.ask("request_stop", name)
                if not has_begun(status):
                    self.line.message(f"{name}: stopping; no step has been done yet")
                    self.end_fleet()
                    return None  # no step was done in this attempt: there is nothing new to save
                self.line.message(f"{name}: saving a checkpoint, then stopping (again to stop at once)")
            if pause is None and not self.signal and status.steps_done > status.start_step and (pause := self.reason_to_pause(status)):
                self.ask("request_pause", number, pause.reason)
                self.line.message(f"{pause.reason}; saving a checkpoint, then going on with other workers")
            self.show(status)
            self.account(status)
            if stop_asked_at is not None and time.monotonic() - stop_asked_at > cluster.stop_grace_seconds:
                self.line.message(f"no checkpoint within cluster.stop_grace_seconds={cluster.stop_grace_seconds:g}; stopping")
                self.end_fleet()
                return None
        failure = failure_of_ranks(self.ask("ends", number))
        self.result = self.ask("result", number)
        if failure is None and self.result is not None and self.result["stopped"] and pause is not None and not self.signal:
            raise pause
        # An attempt that handed in its result had nothing left to do; what died after that does not matter.
        if failure is None or self.result is not None or self.is_taken_over():
            return None
        return failure

    def on_failure(self, number: int, failure: Failure, history: History) -> None:
        self.restarts += 1
        status: Status = self.ask("status")
        reached = max((rank.steps_done for rank in status.ranks.values()), default=0)
        self.tell(
            "attempt_failed",
            attempt=self.number,
            kind=failure.kind,
            rank=failure.rank,
            message=failure.message,
            last_step=reached,
            lost_steps=max(0, reached - max(0, self.committed_step())),
        )
        self.go_back()
        assert failure.step is None or self.start is None or self.start.step <= failure.step, "a commit was acknowledged after a bad step"
        if failure.kind not in ("user", "data"):  # those end the run, with the whole message
            where = f" on rank {failure.rank}" if failure.rank is not None and failure.kind != "numbers" else ""
            lost = reached - (self.start.step if self.start else 0)
            cost = f"{lost} step{'' if lost == 1 else 's'} to do again, " if lost > 0 else ""
            back = f"going on from step {self.start.step:,}" if self.start else "starting from the beginning"
            first_line = failure.message.splitlines()[0][:200]
            self.line.message(f"attempt {self.number} failed{where} at step {reached:,} ({failure.kind}: {first_line}); {cost}{back}")

    def on_skip(self, step: int, failure: Failure) -> None:
        self.skip |= {step}
        self.tell("batch_skipped", attempt=self.number, step=step, reason=failure.message)
        self.line.message(f"the batch of step {step:,} is left out from now on")

    def go_back(self) -> None:
        """To the newest commit; a checkpoint that all ranks had staged still counts."""
        self.ask("drain", 30.0)
        self.start = self.find_start()
        if self.start is not None:
            self.journal.write("resumed", step=self.start.step, path=self.start.path)

    # Fleets

    def start_fleet(self) -> Failure | None:
        """A fleet of as many agents as there is room for; the failure where there is too little."""
        workers = self.resources.most
        if self.resources.fewest < self.resources.most:
            room = self.wait_for_room()
            if room is None:
                return None if self.signal else self.no_room()
            workers = room
        self.fleets += 1
        self.workers, self.placement_group, self.room_since, self.asked_for_workers = workers, "", None, 0
        self.fleet = Fleet(
            self.fleets,
            self.coordinator,
            name=f"{self.config.run}-{self.number}-{os.getpid()}",
            resources=self.resources.with_workers(workers),
            modules=RANK_MODULES,
            zygote=self.zygote,
            notice=self.config.cluster.preemption_notice,
            placement_seconds=self.config.cluster.placement_seconds,
            heartbeat_seconds=self.config.cluster.heartbeat_seconds,
            on_ended=lambda: self.woken.put(None),
        )
        return None

    def wait_for_room(self) -> int | None:
        """How many workers the cluster holds now, at least the fewest; None if it did not in time, or a signal came. What the fleet before
        this one held comes back within a second or two: that is waited for. If it is too little then, the fewest are asked for, and in one
        group: two runs that wait, each holding half of what it needs, would wait for each other."""
        began = time.monotonic()
        settled = began + SETTLE_SECONDS
        try:
            while True:
                now = time.monotonic()
                if self.demand.is_placed():
                    # Not counted in place: what Ray calls free is a moment old, and this room may be in it still, or not yet again.
                    self.demand.withdraw()
                    settled = now + SETTLE_SECONDS
                room = min(self.resources.most, workers_that_fit(self.resources, free_resources()))
                possible = min(self.resources.most, workers_that_fit(self.resources, total_resources()))
                if room >= self.resources.fewest and (room >= possible or now > settled):
                    self.waiting = ""
                    return room
                if self.signal or now - began > self.config.cluster.placement_seconds:
                    return None
                if room < self.resources.fewest:
                    self.waiting = f"waiting for room for {self.resources.fewest} workers, there is for {room}"
                    if self.may_ask and now > settled:
                        self.demand.state(1, workers_each=self.resources.fewest)
                self.show(self.ask("status"))
                time.sleep(0.2)
        finally:
            self.demand.withdraw()

    def no_room(self) -> Failure:
        return Failure(
            kind="infrastructure",
            rank=None,
            message=f"the cluster had no room for {self.resources.fewest} workers in cluster.placement_seconds="
            f"{self.config.cluster.placement_seconds:g}; add nodes, or ask for fewer with --workers",
        )

    def end_fleet(self) -> None:
        """Have its agents end, and wait for that; what does not end by itself loses its place."""
        self.demand.withdraw()  # it would take what the fleet gives back, and the next one needs that
        fleet, self.fleet = self.fleet, None
        if fleet is None:
            return
        with contextlib.suppress(ray.exceptions.RayError):  # without a coordinator the agents end by themselves
            self.ask("end_fleet", fleet.number)
        if not fleet.wait(FLEET_END_SECONDS) and self.placement_group:
            with contextlib.suppress(ray.exceptions.RayError):
                remove_placement_group(self.placement_group)
            fleet.wait(FLEET_END_SECONDS)
        fleet.abandon()

    def fleet_died(self, fleet: Fleet) -> Failure | None:
        """Ray Train gave up on a worker: the ranks went with it."""
        self.demand.withdraw()
        self.fleet = None
        self.result = self.ask("result", self.number)
        if self.result is not None or self.is_taken_over():
            return None
        failure = fleet.failure()
        return failure or Failure(kind="infrastructure", rank=None, message="the agents ended before their ranks had")

    def silent_agents(self, status: Status) -> list[int]:
        """Ranks without a living agent, when that holds up an attempt: others of it have ended, or its node is gone."""
        silent = [rank for rank, age in status.agent_ages.items() if age > AGENT_SILENT_SECONDS and rank not in status.ended_ranks]
        if not silent:
            return []
        if status.ended_ranks and len(status.ended_ranks) + len(silent) >= status.world_size:
            return silent
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return [rank for rank in silent if status.reports[rank].node_id not in alive]

    def agents_lost(self, silent: list[int], status: Status) -> Failure:
        """The agents of these ranks do not answer: their nodes or their workers are gone. The rest of the fleet goes too."""
        nodes = sorted({status.reports[rank].node_id[:8] for rank in silent})
        ranks = ", ".join(map(str, silent))
        self.ask("kill_attempt", self.number)
        self.end_fleet()
        return Failure(
            kind="infrastructure",
            rank=silent[0],
            message=f"the agents of rank{'s' if len(silent) > 1 else ''} {ranks} on node {', '.join(nodes)} do not answer",
        )

    def reason_to_pause(self, status: Status) -> _Pause | None:
        """A node of ours is about to go, or there is room for more workers."""
        if status.notices:
            return _Pause("preempted", f"notice of preemption: {'; '.join(status.notices)}")
        now = time.monotonic()
        if now - self.looked_at_cluster < CLUSTER_POLL_SECONDS:
            return None
        self.looked_at_cluster = now
        ours = {report.node_id for report in status.reports.values()}
        if leaving := sorted(node[:8] for node in draining_nodes() if node in ours):
            return _Pause("preempted", f"Ray drains node {', '.join(leaving)}")
        lacking = self.resources.most - self.workers
        if lacking <= 0:
            return None
        room = self.workers + min(lacking, workers_that_fit(self.resources, free_resources()))
        if self.may_ask:
            self.ask_for_workers(lacking, room - self.workers)
        if room <= self.workers:
            self.room_since = None
            return None
        self.room_since = now if self.room_since is None else self.room_since
        if now - self.room_since < self.config.cluster.grow_after_seconds:
            return None
        return _Pause("grow", f"there is room for {room} workers, {self.workers} are at work")

    def ask_for_workers(self, lacking: int, room: int) -> None:
        """Tell an autoscaler how many workers are lacking, where there is room for none of them."""
        wanted = groups_wanted(lacking=lacking, room=room, is_placed=self.demand.is_placed())
        if self.demand.state(wanted) and wanted != self.asked_for_workers:
            self.asked_for_workers = wanted
            self.tell("workers_asked_for", attempt=self.number, workers=wanted)

    def break_hang(self, hang: Hang, status: Status) -> Failure:
        """Stacks of all ranks into the journal, then the end of their processes."""
        self.tell("hang", attempt=self.number, kind=hang.kind, ranks=list(hang.ranks), seconds=hang.seconds)
        self.line.message(f"{hang.describe()}; taking stacks, then starting again")
        self.ask("ask_stacks", self.number)
        self.wait_until(lambda now: len(now.stacks | now.ended_ranks) == now.world_size, STACKS_SECONDS)
        self.ask("kill_attempt", self.number)
        if not self.wait_until(lambda now: len(now.ended_ranks) == now.world_size, STACKS_SECONDS):
            self.end_fleet()  # a process in an uninterruptible wait: leave the node's worker with it
        return Failure(kind="hang", rank=hang.ranks[0] if len(hang.ranks) == 1 else None, message=hang.describe())

    def account(self, status: Status) -> None:
        """Every few seconds: tell Prometheus where the run's seconds went so far."""
        every = ACCOUNT_SECONDS if self.storage.is_local else 6 * ACCOUNT_SECONDS  # elsewhere each event is an object to fetch
        if time.monotonic() - self.accounted_at < every or 0 not in status.ranks:
            return
        self.accounted_at = time.monotonic()
        stats = status.ranks[0].stats
        events = [*read_journal(self.storage, self.config.run), {"time": time.time(), "event": "now"}]
        self.ask("account", accounting(events, {name: stats.get(f"total_{name}", 0.0) for name in ACCOUNTED}))

    def wait_until(self, condition: Callable[[Status], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not (done := condition(self.ask("status"))) and time.monotonic() < end:
            time.sleep(0.05)
        return done

    # The coordinator and the storage

    def is_taken_over(self) -> bool:
        """Another process drives this run now. A storage that does not answer says nothing about that."""
        try:
            return self.store.newest_generation() > self.generation
        except OSError:
            return False

    def tell(self, event: str, **fields: Any) -> None:
        """Into the journal by way of the coordinator, which counts failures; directly where it is gone."""
        try:
            ray.get(self.coordinator.event.remote(event, **fields), timeout=60)
        except ray.exceptions.RayError:
            self.journal.write(event, **fields)

    def committed_step(self) -> int:
        """Of the newest commit; -1 where there is none."""
        commits = self.store.commits()
        return commits[0].step if commits else -1

    def wait_for_news(self, fleet: Fleet, ended: int, *, is_told: bool) -> Status:
        """The status once more than `ended` ranks have ended, or the fleet, or a signal has come (unless `is_told`: the ranks know), or a
        heartbeat is over."""
        self.woken = SimpleQueue()  # not a threading.Event: a signal's handler may find its lock taken
        if is_told or not self.signal:
            news = self.coordinator.news.remote(ended, poll_seconds(fleet.workers, self.config.cluster.heartbeat_seconds))
            woken = self.woken
            news.future().add_done_callback(lambda _: woken.put(None))
            with suppress(Empty):
                woken.get(timeout=60)
            if not fleet.wait(0) and (is_told or not self.signal):
                status: Status = ray.get(news, timeout=60)
                return status
        now: Status = self.ask("status")
        return now

    def ask(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self.coordinator, method).remote(*args), timeout=60)

    # What the user sees

    def show(self, status: Status) -> None:
        ranks = status.ranks
        started = self.start.step if self.start else 0
        steps = max((rank.steps_done for rank in ranks.values()), default=started)
        stats = ranks[0].stats if 0 in ranks else {}
        if self.signal:
            phase = "stopping"
        elif self.waiting:
            phase = self.waiting
        elif steps > started:
            phase = "training"
        else:
            again = "re" if self.number > 1 and self.restarts else ""
            phase = f"{again}starting workers" if len(ranks) < self.workers else "loading data and model"
        if phase != self.phase:
            self.phase, self.phase_began = phase, time.monotonic()
        if status.failed_checkpoints > self.failed_checkpoints:
            self.failed_checkpoints = status.failed_checkpoints
            if time.monotonic() - self.failure_told_at > CHECKPOINT_WARNING_SECONDS:
                self.failure_told_at = time.monotonic()
                self.line.message(f"warning: a checkpoint was not saved, training goes on: {status.checkpoint_problem}")
        rate = stats.get("images_per_second") or 0.0
        left = (self.total_steps - steps) * self.config.data.batch_size / rate if rate else None

        def known(name: str) -> float | None:
            value = stats.get(name)
            return None if value is None or value != value else value

        self.line.update(
            RunState(
                run=self.config.run,
                phase=self.phase,
                phase_seconds=None if phase == "training" else time.monotonic() - self.phase_began,
                step=steps,
                total_steps=self.total_steps,
                epoch=steps / self.steps_per_epoch,
                epochs=self.config.train.epochs,
                loss=known("loss"),
                learning_rate=known("learning_rate"),
                images_per_second=known("images_per_second"),
                data_wait_ratio=known("data_wait_ratio"),
                headline=known("test_accuracy"),
                checkpoint_step=status.last_commit_step,
                checkpoint_age_seconds=time.time() - status.last_commit_time if status.last_commit_time else None,
                remaining_seconds=left,
                restarts=self.restarts,
            )
        )

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a checkpoint first; the second one ends the program at once."""

        def handler(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self.signal and now - self.signal_at < SAME_SIGNAL_SECONDS:
                return  # `timeout` and some schedulers send theirs to the process and to its group
            if self.signal:
                print("stopped at once; the same command goes on from the newest saved checkpoint", file=sys.stderr)
                raise SystemExit(128 + number)
            self.signal, self.signal_at = number, now
            self.woken.put(None)

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    # Four ways to end.

    def end_finished(self) -> int:
        self.journal.write("run_finished", steps=self.total_steps)
        summary, report = self.write_summary("finished")
        folder = f"{self.storage.uri}/{self.config.run}"
        self.console.print(final_table(summary, report=report, predict=predict_command(folder)), soft_wrap=True)
        return 0

    def end_stopped(self) -> int:
        commit = self.store.newest_valid(lambda path, reason: None)
        self.journal.write("run_stopped", step=commit.step if commit else 0, signal=signal.Signals(self.signal).name if self.signal else "")
        summary, report = self.write_summary("stopped")
        self.console.print(final_table(summary, report=report), soft_wrap=True)
        if commit:
            done = f"step {commit.step:,} of {self.total_steps:,} is saved. The same command goes on from there"
        else:
            done = "nothing was saved yet. The same command starts again"
        self.console.print(f"stopped: {done}:\n  {redact(self.command)}", soft_wrap=True, markup=False, highlight=False)
        return 128 + self.signal if self.signal else 1

    def end_taken_over(self) -> int:
        """Nothing but the journal is written: summary and report are the other process's now."""
        claim = json.loads(self.storage.read(f"{self.config.run}/generations/g{self.store.newest_generation():04d}"))
        other = f"process {claim['pid']} on {claim['host']}"
        self.journal.write("run_taken_over", by=other, generation=self.generation)
        print(
            f"error: run {self.config.run} was taken over by {other}, which goes on from the newest checkpoint; this process ends. "
            "To have both, give one of them another --run NAME",
            file=sys.stderr,
        )
        return 1

    def end_failed(self, error: RunFailed) -> int:
        self.journal.write(
            "run_failed", kind=error.failure.kind, rank=error.failure.rank, message=error.failure.message, reason=error.reason
        )
        self.write_summary("failed")
        if error.failure.kind == "user" and not error.failure.message.startswith(SAYS_IT_ALL):
            print(error.failure.traceback, file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        if (step := self.committed_step()) >= 0:
            print(f"step {step} is saved; once the cause is mended the same command goes on from there", file=sys.stderr)
        return 1

    def write_summary(self, status: str) -> tuple[dict[str, Any], str | None]:
        """The summary, and where the report is; None where it could not be written."""
        from trainer.report.sections import write_report  # half a second of imports that nobody waits for before training

        events = read_journal(self.storage, self.config.run)
        summary = summarise(
            config=self.config,
            status=status,
            events=events,
            result=self.result,
            facts={
                "workers": self.workers,
                "threads": self.resources.threads_per_worker,
                "steps_per_epoch": self.steps_per_epoch,
                "classes": list(self.dataset.manifest.classes),
                "dataset_fingerprint": self.dataset.manifest.fingerprint,
                "quarantined": self.dataset.manifest.quarantined + self.ask("status").quarantined,
                "versions": versions(),
                "command": self.command,
            },
        )
        if summary["accounting"]:
            self.journal.write("account", seconds=summary["accounting"], goodput=summary["goodput"])
        try:
            encoded = json.dumps(redacted(_finite(summary)), indent=1, allow_nan=False).encode()
            self.storage.write_atomic(f"{self.config.run}/summary.json", encoded)
            return summary, str(write_report(f"{self.storage.uri}/{self.config.run}", self.dataset))
        except OSError as error:  # a full disk, most likely: what came out is still told, and the checkpoints are what they were
            print(f"warning: summary.json and report.html could not be written: {error}", file=sys.stderr)
            return summary, None


def _finite(value: Any) -> Any:
    """`value` with null in place of NaN and infinity, which JSON does not have."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


def has_begun(status: Status) -> bool:
    """Whether the attempt may have steps that are not saved. Beats are a second old, and a fast run has done many meanwhile."""
    at_work = any(rank.pulse.get("phase", STARTING) != STARTING for rank in status.ranks.values())
    return at_work or status.steps_done > status.start_step or (status.last_commit_step or 0) > status.start_step


def signs(status: Status) -> dict[int, Sign]:
    """What the hang watch goes by, of the ranks that still live."""
    return {
        rank: Sign(
            state=known.report.state if known.report is not None else "",
            age_seconds=known.age_seconds,
            ticks=int(known.pulse.get("ticks", 0)),
            phase=str(known.pulse.get("phase", "starting")),
        )
        for rank, known in status.ranks.items()
        if rank not in status.ended_ranks
    }

"""The campaign's control plane: every storage call of the driver and of the coordinator, and every message of the coordinator, fails.

    python -m benchmarks.faults.control [NAME ...] [--place local s3] [--every N] [--jobs N] [--json]

A trial is a whole run in one process (benchmarks/faults/local_ray.py): `trainer.run` with its driver, coordinator, agents and two ranks of
eight short steps, one of which dies on the way (scenario `death`), or that is stopped and goes on (`stop`), or that gets a second worker
(`grow`). An undisturbed run records the calls. Then each call has a trial of its own, and so has each message:

    once           the call fails, and nothing was done
    answer lost    the call was done, and its caller is told that it failed
    lasting        from this call on all fail for 90 s
    refused        from this call on all are refused (credentials, permissions)
    killed before, inside, after    the coordinator dies when the message comes, while it is handled, or before its answer
    twice          every message of the run is delivered twice

Promised: the run ends with the bits of the undisturbed one. Only what the storage refuses for good may end it, with one line that says so
and without a traceback; then the same command goes on to the same bits. Seconds pass `SCALE` times faster.
"""

import argparse
import contextlib
import faulthandler
import functools
import importlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.faults import local_ray, s3, small_rank
from benchmarks.faults.calls import DRIVER, HOWS, How, Storages, Strike, inherit_lives, this_life
from benchmarks.faults.local_ray import MESSAGE_HOWS, Actor, MessageHow, MessageStrike
from benchmarks.faults.times import RETRY_SECONDS, SHORTER, scale_times
from trainer import run as command
from trainer.report import page, plots
from trainer.settings import cli
from trainer.settings.cli import Invocation

Row = dict[str, Any]
Place = Literal["local", "s3"]
Scenario = Literal["death", "stop", "grow"]
PLACES: tuple[Place, ...] = ("local", "s3")
SCENARIOS: tuple[Scenario, ...] = ("death", "stop", "grow")

PROJECT = Path(__file__).resolve().parents[2]
SCALE = 30.0
OUTAGE_SECONDS = 90.0
TRIAL_SECONDS = 60.0
"""A run that has not ended by then hangs. Undisturbed it takes two seconds."""
STEPS = 8
SETTINGS = (
    *("--data.path", str(PROJECT / "dataio" / "samples" / "fashion_mnist"), "--data.batch-size", "40"),
    *("--model.name", "shufflenet_v2_x0_5", "--model.weights", "none", "--model.stem", "native", "--train.precision", "fp32"),
    *("--train.epochs", "1", "--train.max-steps", str(STEPS), "--train.checkpoint-every", "2", "--train.virtual-ranks", "2"),
    *("--cluster.threads-per-worker", "1", "--cluster.cpus-per-worker", "1", "--cluster.heartbeat-seconds", "0.1"),
    *("--cluster.storage-retry-seconds", f"{RETRY_SECONDS / SCALE:.3f}", "--cluster.faults.backoff-seconds", "0.1"),
    *("--cluster.grow-after-seconds", "0.1", "--cluster.hang-seconds", "5", "--cluster.start-seconds", "20"),
)
CALL_TIMEOUT_SECONDS = 0.5
"""After how long Ray tells the caller of a lost call that the actor cannot be reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run and what happens to it."""

    place: Place = "local"
    scenario: Scenario = "death"
    storage: Strike = field(default_factory=lambda: Strike(kind="driver"))
    message: MessageStrike = field(default_factory=MessageStrike)
    call: str = ""
    """What the struck call was in the undisturbed run."""

    def describe(self) -> str:
        what = f"{self.place}, {self.scenario}"
        if self.storage.how != "record":
            what += f", storage call {self.storage.first} of the {self.storage.kind} ({self.call}) {self.storage.how}"
        if self.message.how != "record":
            what += f", {self.message.method or 'each message'} {self.message.number or ''} {self.message.how}"
        return what


COUNTED = ("restarts", "resized", "quarantined", "batches_skipped", "hangs")


@dataclass(kw_only=True, slots=True)
class Outcome:
    """How a run ended. `status` is the command's exit status; None: it did not end in TRIAL_SECONDS."""

    status: int | None
    sha256: str = ""
    step: int = -1
    """Of the newest valid checkpoint."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What the summary counts (COUNTED)."""
    failed: list[dict[str, Any]] = field(default_factory=list)
    """The journal's events attempt_failed and run_failed."""
    events: dict[str, int] = field(default_factory=dict)
    struck: bool = False
    """The trial's fault happened."""
    calls: list[tuple[str, str]] = field(default_factory=list)
    messages: list[tuple[str, int, str]] = field(default_factory=list)
    seconds: float = 0.0
    output: str = ""
    problem: str = ""
    """Why the outcome could not be read."""


# -- one trial, in a process of its own ---------------------------------------------------------------------------------------------------


@functools.cache
def parsed(workers: str) -> Invocation:
    """The command line, parsed once for all forks: it takes a third of a second."""
    return cli.parse(["--storage", "runs", "--run", "run", "--workers", workers, *SETTINGS])


def import_all() -> None:
    """Do once, for all forks, what costs them seconds and touches no storage."""
    for name in ("trainer.drive.drive", "trainer.drive.session", "trainer.report.sections", "cluster.preflight", "boto3"):
        importlib.import_module(name)
    for workers in ("2", "1:2"):
        parsed(workers)


def save_time(invocation: Invocation) -> None:
    """Leave out what costs a trial a second and is not its subject: parsing its arguments, and drawing the report's curves."""
    vars(command)["parse"] = lambda argv: invocation
    vars(plots)["svg"] = lambda figure, ident: page.Html("<svg></svg>")


def run_once(trial: Trial, uri: str, root: str, out: Path, *, is_second: bool) -> None:
    """The body of a forked process: the run, then what is left of it, as JSON in `out`."""
    faulthandler.enable()  # SIGABRT shows where it hangs
    inherit_lives()
    others = open(out.with_suffix(".others.log"), "w", buffering=1)  # noqa: SIM115  # lives as long as the process
    sys.stdout = DriversOutput(sys.stdout, others)
    sys.stderr = DriversOutput(sys.stderr, others)
    storages = Storages(root, trial.storage)
    actors: list[Actor] = []
    local_ray.install(trial.message, on_actor=actors.append)
    scale_times(SCALE)
    script = small_rank.SCRIPT
    workers = "2"
    if not is_second:
        script.quarantines_at = 3
        script.deaths = {(1, 5)} if trial.scenario == "death" else set()
        if trial.scenario == "stop":
            script.on_step = lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 3 else None
    if trial.scenario != "death":
        script.step_seconds = 0.15  # so that there are steps left when the ranks have agreed
    if trial.scenario == "grow":
        workers = "1:2"
        local_ray.give_room(after_first_fleet=1)
    invocation = parsed(workers)
    save_time(replace(invocation, config=replace(invocation.config, storage=uri)))
    storages.install()
    began = time.monotonic()
    status = status_of(["--storage", uri, "--run", "run", "--workers", workers, *SETTINGS])
    seconds = time.monotonic() - began
    storages.stop()
    for actor in actors:
        actor.bury()
    outcome = Outcome(
        status=status,
        struck=storages.has_struck or any(actor.has_struck for actor in actors) or trial.message.how == "twice",
        calls=[(seen.call, seen.path) for seen in storages.seen] if trial.storage.how == "record" else [],
        messages=[(m.method, m.number, m.sender) for actor in actors for m in actor.messages] if trial.message.how == "record" else [],
        seconds=seconds,
    )
    try:
        _look_at_what_is_left(outcome, uri)
    except Exception as error:
        outcome.problem = f"{type(error).__name__}: {error}"
    out.write_text(json.dumps(asdict(outcome)))


class DriversOutput(io.TextIOBase):
    """Standard output, or what takes its place in the processes that Ray would start: their output is not the command's."""

    def __init__(self, own: Any, others: Any) -> None:
        self._own, self._others = own, others

    def write(self, text: str) -> int:
        return int((self._own if this_life() is DRIVER else self._others).write(text))

    def flush(self) -> None:
        self._own.flush()

    def fileno(self) -> int:
        return int(self._own.fileno())

    def isatty(self) -> bool:
        return False


def status_of(argv: Sequence[str]) -> int:
    try:
        return command.main(list(argv))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _look_at_what_is_left(outcome: Outcome, uri: str) -> None:
    from cluster.journal import read_journal
    from cluster.storage import open_storage
    from cluster.store import Store

    place = open_storage(uri)
    events = read_journal(place, "run")
    outcome.events = dict(Counter(event["event"] for event in events))
    outcome.failed = [
        {key: event.get(key) for key in ("event", "kind", "rank", "message", "reason")}
        for event in events
        if event["event"] in ("attempt_failed", "run_failed")
    ]
    if place.exists("run/summary.json"):
        summary = json.loads(place.read("run/summary.json"))
        outcome.sha256 = summary.get("weights_sha256") or ""
        outcome.numbers = {key: summary.get(key) for key in COUNTED}
    commit = Store.open(place, "run").newest_valid(lambda path, reason: None, mark=False)
    outcome.step = commit.step if commit else 0


def fork_run(trial: Trial, uri: str, root: str, folder: Path, *, is_second: bool = False) -> "Running":
    name = "second" if is_second else "first"
    log, out = folder / f"{name}.log", folder / f"{name}.json"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (open(one, "w", buffering=1, closefd=False) for one in (1, 2))  # noqa: SIM115
            run_once(trial, uri, root, out, is_second=is_second)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(0)
    return Running(pid=pid, log=log, out=out, ends=time.monotonic() + TRIAL_SECONDS)


@dataclass(kw_only=True, slots=True)
class Running:
    pid: int
    log: Path
    out: Path
    ends: float

    def poll(self) -> Outcome | None:
        """The outcome once the process has ended; it is killed when its time is up."""
        done, _ = os.waitpid(self.pid, os.WNOHANG)
        if not done and time.monotonic() < self.ends:
            return None
        if not done:
            os.kill(self.pid, signal.SIGABRT)
            os.waitpid(self.pid, 0)
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        if not self.out.exists():
            return Outcome(status=None, struck=True, output=text[-20_000:])
        outcome = Outcome(**json.loads(self.out.read_text()))
        outcome.output = text[-6000:]
        return outcome


# -- what was promised ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    trial: Trial
    kind: Literal["same bits", "ended, then same bits", "not reached", "violation"]
    why: str = ""


def may_end(trial: Trial) -> bool:
    """Whether this fault may end a run: the storage refuses for good. What may pass is waited for, on a disk as on an object store."""
    return trial.storage.how == "refused"


def is_done(outcome: Outcome) -> bool:
    """Whether the run finished and its summary is written."""
    return outcome.status == 0 and outcome.sha256 != ""


def judge_numbers(trial: Trial, outcome: Outcome, base: Outcome) -> str:
    """A message that comes twice counts once."""
    if trial.message.how == "twice" and is_done(outcome) and outcome.numbers != base.numbers:
        return f"the summary counts {outcome.numbers}, the undisturbed one {base.numbers}"
    return ""


def judge_first(trial: Trial, outcome: Outcome, sha256: str) -> str:
    """What is wrong with a run's first end; "" if nothing is. `sha256` is the undisturbed run's."""
    if outcome.status is None:
        return f"did not end in {TRIAL_SECONDS:g} s: {_stacks(outcome.output)}"
    if "Traceback (most recent call last)" in outcome.output:
        return f"traceback: {_last_words(outcome.output)}"
    # A stop that is agreed on after the last step finds a finished run.
    if outcome.status == 0 or (trial.scenario == "stop" and outcome.status == 128 + signal.SIGTERM):
        if outcome.problem:
            return outcome.problem
        if outcome.status == 0 and not outcome.sha256 and may_end(trial) and "warning: summary.json" in outcome.output:
            return ""
        if outcome.status == 0 and (outcome.sha256, outcome.step) != (sha256, STEPS):
            return f"other bits: step {outcome.step}, weights {outcome.sha256[:12]} and not {sha256[:12]}"
        return ""
    if may_end(trial) and outcome.status in (1, 2) and "error: " in outcome.output:
        return ""
    kinds = [f"{one['kind']}: {str(one['message'])[:200]}" for one in outcome.failed if one["event"] == "run_failed"]
    return f"exit status {outcome.status} ({kinds[-1] if kinds else 'no run_failed'}; {_last_words(outcome.output)})"


def judge_second(outcome: Outcome, sha256: str) -> str:
    if outcome.status != 0:
        return f"the same command then ended with {outcome.status}: {_last_words(outcome.output)}"
    if (outcome.sha256, outcome.step) != (sha256, STEPS):
        return f"the same command then came to other bits: step {outcome.step}, weights {outcome.sha256[:12]}"
    return ""


def _last_words(output: str) -> str:
    lines = [line.strip()[:200] for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-3:])


def _stacks(output: str) -> str:
    """The main thread's lines of faulthandler's dump."""
    _, _, main = output.rpartition("Current thread") if "Current thread" in output else ("", "", output[-500:])
    places = [line.strip().replace(f"{PROJECT}/", "") for line in main.splitlines() if line.strip().startswith("File")]
    ours = [place for place in places if "/lib/python" not in place]
    return " < ".join(ours[:5]) or _last_words(output)


class Campaign:
    """Runs trials, several at a time, and compares each with the undisturbed run of its scenario and place."""

    def __init__(self, scratch: Path, *, jobs: int, say: Callable[[str], None]) -> None:
        self._scratch, self._jobs, self._say = scratch, jobs, say
        self._count = 0
        self._base: dict[tuple[Place, Scenario, str], Outcome] = {}

    def undisturbed(self, place: Place, scenario: Scenario, kind: str = "driver") -> Outcome:
        """The run without a fault, with the storage calls of `kind` and the messages recorded."""
        key = (place, scenario, kind)
        if key not in self._base:
            trial = Trial(place=place, scenario=scenario, storage=Strike(kind=kind))
            [(_, outcome, second)] = list(self._run([trial]))
            final = second or outcome
            if final.status != 0 or final.step != STEPS or not final.sha256:
                raise AssertionError(f"the undisturbed run failed ({trial.describe()}): {final}")
            if second is not None:
                outcome.sha256 = second.sha256
            self._base[key] = outcome
        return self._base[key]

    def judge(self, trials: Iterable[Trial]) -> Iterator[Verdict]:
        for trial, first, second in self._run(trials):
            base = self._base[trial.place, trial.scenario, trial.storage.kind]
            sha256 = base.sha256
            why = judge_first(trial, first, sha256) or judge_numbers(trial, first, base)
            if not why and second is not None:
                why = judge_second(second, sha256)
            if why:
                yield Verdict(trial=trial, kind="violation", why=why)
            elif not first.struck:
                yield Verdict(trial=trial, kind="not reached")
            else:
                yield Verdict(trial=trial, kind="same bits" if second is None or trial.scenario == "stop" else "ended, then same bits")

    def _run(self, trials: Iterable[Trial]) -> Iterator[tuple[Trial, Outcome, Outcome | None]]:
        """(trial, its first run, and the second one that followed if the first did not finish)"""
        waiting = list(reversed(list(trials)))
        running: list[tuple[Trial, Running, Outcome | None, tuple[str, str, Path]]] = []
        while waiting or running:
            while waiting and len(running) < self._jobs:
                trial = waiting.pop()
                where = self._where(trial)
                running.append((trial, fork_run(trial, *where), None, where))
            for entry in list(running):
                trial, process, first, where = entry
                outcome = process.poll()
                if outcome is None:
                    continue
                running.remove(entry)
                if first is None and outcome.status is not None and not is_done(outcome):
                    calm = replace(trial, storage=Strike(kind="driver"), message=MessageStrike())
                    running.append((trial, fork_run(calm, *where, is_second=True), outcome, where))
                elif first is None:
                    yield trial, outcome, None
                else:
                    yield trial, first, outcome
            time.sleep(0.01)

    def _where(self, trial: Trial) -> tuple[str, str, Path]:
        """(the storage's URI, its root, a folder for logs)"""
        self._count += 1
        folder = self._scratch / f"{self._count:05d}"
        folder.mkdir(parents=True)
        if trial.place == "local":
            return str(folder / "runs"), str(folder / "runs"), folder
        bucket = s3.new_bucket(f"trial-{folder.name}")
        return f"s3://{bucket}/runs", f"{bucket}/runs", folder


def storage_trials(campaign: Campaign, place: Place, kind: str, how: How, every: int) -> Iterator[Trial]:
    """A trial for each storage call of the undisturbed run, or for each `every`-th."""
    base = campaign.undisturbed(place, "death", kind)
    for number in range(1, len(base.calls) + 1, every):
        strike = Strike(kind=kind, how=how, first=number, seconds=OUTAGE_SECONDS / SCALE)
        yield Trial(place=place, storage=strike, call=" ".join(base.calls[number - 1]))


def message_trials(campaign: Campaign, place: Place, scenario: Scenario, how: MessageHow, every: int) -> Iterator[Trial]:
    """A trial for each message of the undisturbed run, or for each `every`-th. `twice`: a trial for each method, and one
    with all of them."""
    base = campaign.undisturbed(place, scenario)
    if how == "twice":
        for method in ["", *sorted({method for method, _, _ in base.messages})]:
            yield Trial(place=place, scenario=scenario, message=MessageStrike(how=how, method=method))
        return
    silence = 1.5 * SHORTER["CALL_SECONDS"]  # 90 s where a call may take 60
    for method, number, _ in thinned(base.messages)[::every]:
        strike = MessageStrike(how=how, method=method, number=number, seconds=silence, timeout_seconds=CALL_TIMEOUT_SECONDS)
        yield Trial(place=place, scenario=scenario, message=strike)


MOST_POLLS = 24


def thinned(messages: Sequence[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """All messages, but of a method that is polled (order, news, status) at most MOST_POLLS, evenly over the run."""
    totals = Counter(method for method, _, _ in messages)
    stride = {method: max(1, total // MOST_POLLS) for method, total in totals.items()}
    return [one for one in messages if one[1] % stride[one[0]] == 0 or stride[one[0]] == 1]


def row_of(fault: str, verdicts: Iterable[Verdict], say: Callable[[str], None]) -> Row:
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    problems: list[str] = []
    for verdict in verdicts:
        counts[verdict.kind] += 1
        if verdict.kind == "violation":
            problems.append(f"{verdict.trial.describe()}: {verdict.why}")
            say(f"VIOLATION {problems[-1]}")
    trials = sum(counts.values()) - counts["not reached"]
    detail = ", ".join(f"{kind} {count} times" for kind, count in sorted(counts.items()) if kind != "violation")
    return {
        "fault": fault,
        "trials": trials,
        "violations": len(problems),
        "detail": f"{detail}; first violation: {problems[0]}" if problems else detail,
        "problems": problems,
        "seconds": round(time.perf_counter() - began, 1),
    }


STORAGE_ROWS: list[tuple[Place, str, How]] = [(place, kind, how) for place in PLACES for kind in ("driver", "coordinator") for how in HOWS]
MESSAGE_ROWS = [(place, scenario, how) for place in PLACES for scenario in SCENARIOS for how in MESSAGE_HOWS]


def name_of_storage(place: Place, kind: str, how: str) -> str:
    return f"{SAID[how]} at every storage call of the {kind} ({place})"


def name_of_message(place: Place, scenario: Scenario, how: str) -> str:
    return f"{SAID[how]}{'' if how == 'twice' else ' at every message of the coordinator'}, {STORIES[scenario]} ({place})"


SAID = {
    "once": "one failure",
    "answer lost": "a lost answer",
    "lasting": "90 s without an answer",
    "refused": "a refusal",
    "killed before": "death before it is handled",
    "killed inside": "death while it is handled",
    "killed after": "death before its answer",
    "twice": "every message of the coordinator delivered twice",
}
STORIES: dict[Scenario, str] = {"death": "a rank dies", "stop": "stopped and gone on", "grow": "a second worker comes"}
NAMES = [name_of_storage(*row) for row in STORAGE_ROWS] + [name_of_message(*row) for row in MESSAGE_ROWS]


def rows(campaign: Campaign, chosen: Callable[[str], bool], *, every: int, say: Callable[[str], None]) -> Iterator[Row]:
    """The control plane's rows."""
    for place, kind, how in STORAGE_ROWS:
        name = name_of_storage(place, kind, how)
        if chosen(name):
            yield row_of(name, campaign.judge(storage_trials(campaign, place, kind, how, every)), say)
    for place, scenario, message_how in MESSAGE_ROWS:
        name = name_of_message(place, scenario, message_how)
        if chosen(name):
            yield row_of(name, campaign.judge(message_trials(campaign, place, scenario, message_how, every)), say)


@contextlib.contextmanager
def opened(*, jobs: int, places: Sequence[Place], say: Callable[[str], None]) -> Iterator[Campaign]:
    """A campaign with its scratch folder and, if it needs one, its S3."""
    import_all()
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="finetune-control-"))
        if "s3" in places:
            os.environ |= stack.enter_context(s3.Server()).environment
        yield Campaign(Path(scratch), jobs=jobs, say=say)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of the rows; all of them if none is given")
    parser.add_argument("--place", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--every", type=int, default=1, help="try each N-th call alone")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def chosen(name: str) -> bool:
        is_named = not options.names or any(part.lower() in name.lower() for part in options.names)
        return is_named and any(name.endswith(f"({place})") for place in options.place)

    found = []
    with opened(jobs=options.jobs, places=options.place, say=say) as campaign:
        for row in rows(campaign, chosen, every=options.every, say=say):
            found.append(row)
            say(f"{row['fault']}: {row['trials']} trials, {row['violations']} violations in {row['seconds']:.0f} s")
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for row in found:
            counts = f"{row['trials']:>5} trials {row['violations']:>4} violations {row['seconds']:7.1f} s"
            print(f"{row['fault']:70} {counts}  {row['detail'][:200]}")
    return int(any(row["violations"] for row in found))


if __name__ == "__main__":
    sys.exit(main())

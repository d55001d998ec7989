"""Goes from the user's request to a run under way, then hands over to drive.py. Called by trainer/run.py.

Each fact is found once and handed on in a frozen value (trainer/drive/stages.py): Asked, WithData, Placed, Decided, Begun.

Everything that needs no cluster is checked in seconds, before one is started. The zygote starts first: it imports what the ranks need while
this process imports and starts Ray. That is why Ray's imports are inside the functions, and run.py can import this file cheaply.
"""

import dataclasses
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.belongings import belongings, preferred_place, problem_of
from cluster.journal import Journal
from cluster.redact import redact
from cluster.storage import Storage, is_outage, open_storage
from cluster.store import Commit, Store
from cluster.zygote import Zygote
from dataio.balance import class_counts, known_class_counts
from dataio.leaving import leave_by, leaves
from dataio.manifest import image_hw, shape_of
from dataio.parquet import Dataset, open_dataset
from dataio.reading import corrections_told
from dataio.unlabelled import is_resized, pin, problem_of_sizes
from trainer.drive.capability import here, settled, weakest
from trainer.drive.check import Checked, ModelCheck, Question, Refused
from trainer.drive.data import about_transparency, check_can_ship, open_data, open_second, record_left_out
from trainer.drive.device_rules import images_of
from trainer.drive.disk_room import check_room
from trainer.drive.identity import (
    check_may_show,
    check_resume,
    check_same_commit,
    check_same_identity,
    check_same_run,
    find,
    newest_start,
    resolved,
    run_prefix,
)
from trainer.drive.problems import Facts, choice_for, problems_of, refuse_if_wrong, said_of_norms, with_length
from trainer.drive.record import bit_changes, identity_of, record_of, told_bit_changes, told_threads
from trainer.drive.set_up import SetUp
from trainer.drive.signals import Phase, Signals
from trainer.drive.stages import Asked, Begun, Decided, Environment, Placed, WithData, question_of_facts
from trainer.drive.survey import survey
from trainer.drive.trackers import tracked
from trainer.drive.without_ray import WithoutRay
from trainer.runs.choice import rule_of
from trainer.runs.folder import RunFolder
from trainer.runs.progress import final_table, predict_command
from trainer.settings.balance import Balanced, asks_for_balance, balanced, check_balance
from trainer.settings.identity import description_sha256, weights_sha256
from trainer.settings.length import length_of
from trainer.settings.photos import RECIPE, choice_of
from trainer.settings.rules import worker_count
from trainer.settings.second_stream import check_unlabelled
from trainer.settings.spec import order_of, rank_modules, total_steps_of
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig
from trainer.tasks.info import info_of

if TYPE_CHECKING:
    from cluster.launch import ClusterHardware, Resources

PACKAGES = ("cluster", "dataio", "trainer")
PROJECT = Path(__file__).resolve().parents[2]


def run(asked: Asked, console: Console, signals: Signals) -> int:
    """Do one run from its data to its report. Returns the exit status."""
    zygote_name, modules = uuid.uuid4().hex, rank_modules(asked.config)
    with belongings(leave_by=leave_by) as ours, signals.leaving_by(ours.end_at_once), _zygote(zygote_name, modules) as zygote:
        signals.enter(Phase.SETTING_UP)
        from cluster.demand import wait_for_hardware
        from cluster.launch import plan_resources
        from cluster.ray_cluster import ray_cluster
        from trainer.drive.drive import Drive
        from trainer.drive.session import open_session

        for line in unusual(ours.folder):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        signals.enter(Phase.PREPARING_DATA)
        set_up = SetUp(console)
        seen = look_first(asked, zygote, set_up)
        asked = asked.taught_by(seen.facts.config.train.teacher)
        data = with_data(asked, console, set_up, seen.facts.config)
        signals.enter(Phase.SETTING_UP)
        placed, checked = None, None
        if (workers := workers_known(asked)) is not None:
            placed = set_up.call("the run's folder", partial(place, data, workers))
            if placed.has_finished:
                return show_finished(placed, console, signals)
            checked = check_before_cluster(placed, seen, zygote, set_up)
        console.print(f"joining the Ray cluster at {asked.address}" if asked.address else "starting a local Ray")

        without_ray = WithoutRay(signals, ours.end_at_once)
        with ray_cluster(
            asked.config.cluster,
            project=PROJECT,
            address=asked.address,
            in_job=asked.environment.in_job,
            cpus=asked.environment.cpus,
            folder=ours.folder,
            on_lost=without_ray.end,
            packages=PACKAGES,
            verbose=asked.environment.is_verbose,
            process_ends=leaves(),
        ) as hardware:
            workers_asked, cluster = asked.config.workers, asked.config.cluster
            hardware = wait_for_hardware(workers_asked, cluster, hardware, lambda line: console.print(line, soft_wrap=True))
            resources = plan_resources(workers_asked, cluster, hardware)
            if placed is None or set_up.call("the run's folder", partial(placed.is_outdated, resources.most)):
                placed = set_up.call("the run's folder", partial(place, data, resources.most))
                if placed.has_finished:
                    return show_finished(placed, console, signals)
            if placed.found.saved is not None:
                signals.enter(Phase.RESUMING)
            decided = decide(placed, hardware, resources, zygote, checked, console, set_up)
            begun = without_ray.begun(begin(decided, asked.environment, console, set_up))
            session = open_session(decided, begun, zygote=zygote_name, console=console)
            folder = RunFolder(storage=decided.storage, name=decided.config.run)
            with tracked(decided.config, folder, signals, telling(console)):
                return Drive(session, begun.start, signals).go()


def telling(console: Console) -> Callable[[str], None]:
    """Prints a line as it is, whatever is in it."""
    return partial(console.print, soft_wrap=True, markup=False, highlight=False)


def unusual(folder: str) -> Iterator[str]:
    """What the user should know of the driver's temporary folder."""
    if problem := problem_of(preferred_place()):
        yield f"{problem}; Ray's files are in {folder}"
    if os.environ.get("HOME") == folder:
        yield (
            "the home folder cannot be written to: caches, and data that are converted into it, last as long as this command; "
            "set HOME or --data.root to keep them"
        )


@contextmanager
def _zygote(name: str, modules: tuple[str, ...]) -> Iterator[Zygote]:
    """A zygote that imports what the ranks need while this process imports and starts Ray. This saves two seconds, and the ranks of this
    node share its memory."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})  # one to the whole group is for the driver
    try:
        zygote = Zygote(modules, name=name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield zygote
    finally:
        zygote.close(kill=True)


# Before a cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was found before anything was made."""

    facts: Facts
    question: Question | None = None
    """The model that was built already, to see that it can be."""


def look_first(asked: Asked, zygote: Zygote, set_up: SetUp) -> Seen:
    """Find what stands against the run, of all kinds, before anything is converted or made. ValueError that lists it.

    If the data are converted and nothing is wrong, the model is left to `check_before_cluster`: the run may have finished long ago."""
    environment = asked.environment
    facts = survey(asked.config, workers=partial(workers_known, asked), in_job=environment.in_job, call=set_up.call)
    facts = dataclasses.replace(facts, config=choice_for(facts, asked.given, asked.recipes).config)
    facts, _ = with_length(facts, asked.from_recipes)  # which is said once the run is known
    if facts.looked is not None and facts.looked.is_converted and not problems_of(facts):
        return Seen(facts=facts)
    question = question_of_facts(facts)
    facts = dataclasses.replace(facts, model=ModelCheck(zygote, question).answer())
    if isinstance(facts.model, Refused) and facts.model.kind != "value":
        raise facts.model.error()
    refuse_if_wrong(facts)
    return Seen(facts=facts, question=question)


def with_choice(asked: Asked, dataset: Dataset, storage: Storage) -> Asked:
    """With what the rule for photographs chooses. What the conversion found decides, not the look at the headers before it: so the same
    command chooses the same each time."""
    choice = choice_of(
        asked.config,
        dataset.manifest,
        given=asked.given,
        recipes=asked.recipes,
        workers=workers_known(asked),
        saved=find(storage, asked.config.run).saved,
    )
    prefix = run_prefix(choice.config, (RECIPE,)) if choice.takes_recipe else asked.prefix
    return dataclasses.replace(asked, config=choice.config, prefix=prefix, said=choice.said)


def with_data(asked: Asked, console: Console, set_up: SetUp, seen: RunConfig | None = None) -> WithData:
    """Open the storage and the data, converting the data first if necessary: with the settings that `look_first` found, if they are given,
    since they may allow for more bad images."""
    config = asked.config
    storage = set_up.call("the storage", partial(open_storage, config.storage, config.cluster.storage_retry_seconds))
    weights = weights_sha256(config.model.weights)
    location, dataset = open_data(seen or config, console)
    if "test" not in dataset.manifest.splits:  # found now instead of after the first epoch
        raise ValueError(
            f"{dataset.where} has the splits {', '.join(dataset.manifest.splits)}, and a run is evaluated on test; convert the source "
            "again, which holds one out of train where there is none"
        )
    asked = set_up.call("the run's folder", partial(with_choice, asked, dataset, storage))
    shape = shape_of(dataset.manifest, asked.config.data)
    second = open_second(seen or config, dataset, console)
    if second is not None:
        check_unlabelled(asked.config, dataset.manifest.targets)
        if problem := problem_of_sizes(second.dataset.manifest, asked.config.data, image_hw(shape)):
            raise ValueError(problem)
        asked = asked.with_unlabelled(pin(second))
    return WithData(
        asked=asked,
        dataset=dataset,
        location=location,
        shape=shape,
        storage=storage,
        weights=weights,
        second=second.dataset if second is not None else None,
    )


def workers_known(asked: Asked) -> int | None:
    """Largest number of workers that there may be; None if only the cluster to join can tell."""
    from cluster.launch import ClusterHardware, gpus_here, plan_resources

    wanted = worker_count(asked.config)  # ValueError if the setting is not a number of workers
    if asked.address:
        return wanted
    this_node = ClusterHardware(local=True, nodes=1, cpus=asked.environment.cpus, gpus=gpus_here())
    return plan_resources(asked.config.workers, asked.config.cluster, this_node).most


def place(data: WithData, workers: int) -> Placed:
    """Name the run and look up what the storage holds of it. ValueError if that was another run."""
    found = with_balance(data.asked.config, data.dataset)
    named = resolved(
        found.config,
        data.storage,
        workers=workers,
        fingerprint=data.fingerprint,
        weights=data.weights,
        prefix=data.asked.prefix,
        shape=data.shape,
    )
    check_same_run(named.config, named.found, data.weights)
    length = length_of(
        named.config,
        data.dataset.manifest,
        workers=workers,
        from_recipes=data.asked.from_recipes,
        is_new=named.found.is_new,
    )
    of_new = (*data.asked.said, *found.said) if named.found.is_new else ()
    said = (*of_new, *length.said, *about_transparency(data.dataset, length.config))
    return Placed(data=data, config=length.config, workers=workers, found=named.found, said=said)


def with_balance(config: RunConfig, dataset: Dataset) -> Balanced:
    """The settings with their balance of classes decided, which is part of what the run is called. ValueError if it does not fit."""
    targets = dataset.manifest.targets
    check_balance(config, targets)
    return balanced(config, targets, class_counts(dataset) if asks_for_balance(config) else known_class_counts(dataset))


def check_before_cluster(placed: Placed, seen: Seen, zygote: Zygote, set_up: SetUp) -> Checked:
    """Find in a second, before a cluster is started, what would fail on the workers. ValueError that lists it, or OSError."""
    is_built = seen.question == placed.question
    check = None if is_built else ModelCheck(zygote, placed.question)
    wrong = []
    try:
        set_up.call("the run's folder", partial(check_folder, placed))
    except ValueError as error:
        wrong.append(str(error))
    model = check.answer() if check is not None else seen.facts.model
    if isinstance(model, Refused) and model.kind != "value":
        raise model.error()
    refuse_if_wrong(
        dataclasses.replace(
            seen.facts, config=placed.config, workers=placed.workers, is_new=placed.found.is_new, found_wrong=tuple(wrong), model=model
        )
    )
    assert isinstance(model, Checked)
    return model


def check_folder(placed: Placed) -> None:
    """ValueError if the storage cannot be made, or --resume forbids the checkpoint."""
    config, storage = placed.config, placed.data.storage
    if storage.is_local:
        try:
            storage.make_dir("")
        except OSError as error:
            if is_outage(error):
                raise
            raise ValueError(f"storage {storage.uri!r} cannot be made ({error.strerror}); give a folder that can with --storage") from None
    check_resume(config, has_checkpoint=bool(Store.open(storage, config.run).commits()))


def show_finished(placed: Placed, console: Console, signals: Signals) -> int:
    """Print the results of a run that has already finished, and write what a killed command left out. ValueError if the command asks for
    something else."""
    from trainer.drive.ending import complete

    config, summary = placed.config, placed.found.summary
    assert summary is not None
    check_may_show(config, summary, placed.data.fingerprint)
    signals.enter(Phase.REPORTING)
    console.print(f"run {config.run} has finished already; --run NAME starts another")
    folder = RunFolder(storage=placed.data.storage, name=config.run)
    report = complete(folder, summary, placed.data.dataset, console)
    console.print(final_table(summary, report=report, predict=predict_command(folder.location, info_of(summary).unit)), soft_wrap=True)
    signals.enter(Phase.OVER)
    with tracked(config, folder, signals, telling(console)):
        return 0


# In the cluster


def decide(
    placed: Placed,
    hardware: "ClusterHardware",
    resources: "Resources",
    zygote: Zygote,
    checked: Checked | None,
    console: Console,
    set_up: SetUp,
) -> Decided:
    """Check the nodes, and decide what is left at auto. `checked` is None if the model was not built yet. ValueError if the nodes do not
    fit together."""
    from cluster.preflight import on_every_node, preflight

    data, location = placed.data, placed.data.location
    tell = telling(console)
    use_gpus = resources.gpus_per_worker > 0
    threads = told_threads(data.asked.config, device="cuda" if use_gpus else "cpu", threads=resources.threads_per_worker)
    for line in (*placed.said, *threads):
        tell(line)

    def probe() -> str:
        return open_dataset(location).manifest.fingerprint

    is_shared = set_up.call("the check of all nodes", lambda: preflight(data.storage, placed.config.run, hardware, probe, tell=tell))
    capability = weakest(on_every_node(hardware, partial(here, use_gpus=use_gpus), with_gpus=use_gpus))
    checked = checked or ModelCheck(zygote, placed.question).wait()
    rule_of(placed.config.train, checked.task)  # ValueError if the task has no such measure
    if placed.found.is_new:
        steps = total_steps_of(placed.config, order_of(placed.config, data.dataset.manifest, placed.workers).steps_per_epoch)
        for line in (*checked.notes, *said_of_norms(placed.config, checked, steps)):
            tell(line)
    weights_bytes, resting_bytes = checked.weights_bytes, checked.resting_bytes
    set_up.call(
        "the room for checkpoints", lambda: check_room(data.storage, placed.config, weights_bytes, tell, resting_bytes=resting_bytes)
    )
    config = settled(
        placed.config,
        capability,
        has_depthwise=checked.has_depthwise,
        images=images_of(data.dataset.manifest, placed.config.data),
        workers=placed.workers,
        tell=tell,
    )
    return Decided(
        config=config,
        command=data.asked.command,
        dataset=data.dataset,
        location=location,
        is_shared=is_shared,
        storage=data.storage,
        hardware=hardware,
        resources=resources,
        task=checked.task,
        identity=identity_of(
            config,
            data.dataset.manifest,
            weights=data.weights,
            weights_about=description_sha256(config.model.weights),
            device="cuda" if use_gpus else "cpu",
            threads=resources.threads_per_worker,
            more_is_resized=data.second is not None and is_resized(data.second.manifest, config.data, image_hw(data.shape)),
        ),
        second=data.second,
        said=data.asked.said if placed.found.is_new else (),
    )


def begin(decided: Decided, environment: Environment, console: Console, set_up: SetUp) -> Begun:
    """Claim the run, then record its settings and its start, and find the commit to go on from. ValueError if the run may not go on; then
    a new run's folder has nothing of it."""
    from cluster.versions import versions

    config, storage, resources = decided.config, decided.storage, decided.resources
    store = Store.open(storage, config.run)
    generation = set_up.call("a claim on the run", partial(claim, decided, store))
    journal = Journal.open(storage, config.run, writer=f"driver-{os.getpid()}-{int(time.time())}")
    start = set_up.call("the run's checkpoints", partial(start_of_claimed, decided, store, journal, console))
    settings = redact(to_toml(config)).encode()
    set_up.call("config.toml", partial(storage.write_atomic, f"{config.run}/config.toml", settings))
    tell = telling(console)
    set_up.call("quarantine.jsonl", partial(record_left_out, storage, config.run, decided.dataset, tell, decided.second))
    journal.write(
        "run_started",
        generation=generation,
        command=decided.command,
        versions=versions(),
        pid=os.getpid(),
        process_started=environment.process_started,
        resources=dataclasses.asdict(resources),
        task=decided.task.to_json(),
    )
    if decided.said:
        journal.write("settings_chosen", message="; ".join(decided.said))
    if (reading := decided.dataset.reading) is not None and reading.corrected:
        journal.write("data_corrected", message=corrections_told(reading.corrected))
    if (chosen := decided.dataset.selected) is not None:
        journal.write("samples_chosen", message="; ".join((chosen.line, *chosen.warnings)))
    set_up.tell(journal)
    console.print(f"run {config.run} in {redact(storage.uri)}: {described(resources.workers, decided.hardware)}", soft_wrap=True)
    if start is not None and (differs := bit_changes(start.meta, decided.identity, workers=resources.workers)):
        journal.write("versions_differ", step=start.step, differs={name: list(pair) for name, pair in differs.items()})
        for line in told_bit_changes(differs):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    return Begun(journal=journal, store=store, generation=generation, start=start)


def claim(decided: Decided, store: Store) -> int:
    """Claim the run for this driver and return its generation. The claim says what the run is, and nothing else of a run is written before
    it: of two commands that start one run with different settings at once, one gets a ValueError. Everything that can refuse the command
    is asked before, so that a refused one neither begins a run nor takes one over."""
    config, identity = decided.config, decided.identity
    order_of(config, decided.dataset.manifest)
    if not decided.is_shared:
        check_can_ship(decided.dataset, config)
    newest = store.peek()
    check_resume(config, has_checkpoint=newest is not None)
    if newest is not None:
        check_same_commit(config, newest.meta, identity)
    return store.claim_generation(
        {"identity": identity.record()}, lambda before: check_same_identity(config.run, record_of(before.note), identity)
    )


def start_of_claimed(decided: Decided, store: Store, journal: Journal, console: Console) -> Commit | None:
    """The commit to go on from; None starts at step 0. Journals and sets aside the damaged ones, as only the driver that has claimed the
    run may. ValueError if none is intact, or if it is of another run."""
    start = newest_start(
        store,
        lambda path, reason: journal.write("checkpoint_corrupt", path=path, reason=reason),
        lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False),
    )
    check_resume(decided.config, has_checkpoint=start is not None)
    if start is not None:
        check_same_commit(decided.config, start.meta, decided.identity)
    return start


def described(workers: int, hardware: "ClusterHardware") -> str:
    """Text such as `2 workers on 8 CPUs` or `1 worker on 1 GPU and 16 CPUs`."""

    def counted(count: int, what: str) -> str:
        return f"{count} {what}" if count == 1 else f"{count} {what}s"

    gpus = f"{counted(hardware.gpus, 'GPU')} and " if hardware.gpus else ""
    return f"{counted(workers, 'worker')} on {gpus}{counted(hardware.cpus, 'CPU')}"

"""`--dry-run`: finds the data and the devices and prints what would run, and everything that stands against it. Called by trainer/run.py.

survey.py looks, problems.py judges, both as for a run; plan.py does the arithmetic. Data that are not converted yet are looked at (their
headers), not converted. It starts no driver, so it may import torch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.launch import ClusterHardware, plan_resources
from cluster.machine import usable_cpus
from cluster.storage import open_storage
from cluster.text import shown as on_one_line
from dataio.config import PIN, unpinned
from dataio.reading import corrections_told
from dataio.scan import Looked
from dataio.schema import UNLABELLED
from trainer.drive.capability import here, settled
from trainer.drive.check import Checked, Refused, built
from trainer.drive.data import about_choice
from trainer.drive.device_rules import images_of
from trainer.drive.identity import check_same_run, resolved, run_prefix
from trainer.drive.plan import Devices, ModelFacts, counted, describe, model_facts, table
from trainer.drive.problems import Facts, choice_for, problems_of, refuse_if_wrong, said_of_norms, total_steps, with_balance, with_length
from trainer.drive.stages import question_of_facts
from trainer.drive.survey import survey
from trainer.settings.fields import replaced
from trainer.settings.identity import weights_sha256
from trainer.settings.photos import RECIPE
from trainer.settings.rules import worker_count
from trainer.settings.texts import is_text
from trainer.settings.tree import RunConfig
from trainer.settings.units import number
from trainer.tasks.make import make_task

SHOWN_SIZES = 5
SHOWN_CLASSES = 20
SHOWN_LEFT_OUT = 10


def dry_run(
    config: RunConfig,
    recipes: tuple[str, ...],
    console: Console,
    *,
    from_recipes: frozenset[str] = frozenset(),
    given: frozenset[str] = frozenset(),
    in_job: bool = False,
    ray_address: str = "",
) -> int:
    """Print what would run: data, steps, memory, cost. ValueError that lists all that stands against it."""
    gpus = torch.cuda.device_count()
    facts = survey(config, workers=partial(_workers, config, gpus, config.cluster.address or ray_address), in_job=in_job)
    tell = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    if facts.looked is not None and not facts.looked.is_converted and facts.looked.manifest is not None:
        console.print(data_table(facts.looked, facts.config))
    choice = choice_for(facts, given, recipes)
    facts = dataclasses.replace(facts, config=choice.config)
    facts, of_classes = with_balance(facts)  # it is part of the name
    facts = with_name(facts, (RECIPE,) if choice.takes_recipe else recipes)
    facts, said = with_length(facts, from_recipes)
    corrected = facts.looked.corrected if facts.looked is not None else {}
    of_data = [f"the data: {corrections_told(corrected)} (data.corrections)"] if corrected else []
    for line in (*of_data, *choice.said, *about_choice(facts.selected), *of_classes, *said, *of_unlabelled(facts)):
        tell(line)
    facts, counts = with_model(facts)
    for line in facts.model.notes if isinstance(facts.model, Checked) else ():
        tell(line)
    for line in said_of_norms(facts.config, facts.model, total_steps(facts)):
        tell(line)
    if counts is not None:
        facts = _with(facts, lambda: _decided(facts, counts, gpus, tell))
        if not _cannot_be_planned(facts):
            console.print(table(describe(facts.config, facts.manifest, _devices(facts.workers or 1, gpus), counts, is_new=facts.is_new)))
    refuse_if_wrong(facts)
    return 0


def of_unlabelled(facts: Facts) -> list[str]:
    """What the images without labels would come to."""
    manifest = facts.unlabelled.manifest if facts.unlabelled is not None else None
    if manifest is None:
        return []
    train = facts.config.train
    count, a_step = manifest.splits[UNLABELLED].count, facts.config.data.batch_size * train.unlabelled_ratio
    return [f"{counted(count, 'image')} without labels, {number(min(a_step, count))} a step, learned by {train.semi}"]


def with_name(facts: Facts, recipes: tuple[str, ...]) -> Facts:
    """With the name that the run will have, and what is there of it. Data that are not converted yet have no fingerprint to name it by."""
    if facts.looked is None or not facts.looked.is_converted or facts.shape is None:
        return facts
    manifest, shape, config = facts.looked.manifest, facts.shape, facts.config
    assert manifest is not None
    if (unlabelled := facts.unlabelled) is not None:
        if not unlabelled.is_converted or unlabelled.manifest is None:
            return facts
        place, _ = unpinned(config.data.unlabelled)
        config = replaced(config, "data.unlabelled", f"{place}{PIN}{unlabelled.manifest.fingerprint}")
    try:
        weights = weights_sha256(config.model.weights)
        named = resolved(
            config,
            open_storage(config.storage, config.cluster.storage_retry_seconds),
            workers=facts.workers or 1,
            fingerprint=manifest.fingerprint,
            weights=weights,
            prefix=run_prefix(config, recipes),
            shape=shape,
        )
        check_same_run(named.config, named.found, weights)
    except ValueError as error:
        return dataclasses.replace(facts, found_wrong=(*facts.found_wrong, str(error)))
    return dataclasses.replace(facts, config=named.config, is_new=named.found.is_new)


def with_model(facts: Facts) -> tuple[Facts, ModelFacts | None]:
    """With what building the model says, and the model's numbers. ImageNet weights are not downloaded: that is left to the run."""
    question = question_of_facts(facts)
    if question.model.weights == "imagenet":
        question = dataclasses.replace(question, model=dataclasses.replace(question.model, weights="none"))
    answer = built(question)
    if isinstance(answer, Refused):
        if answer.kind != "value":
            raise answer.error()
        return dataclasses.replace(facts, model=answer), None
    task = make_task(question.task, question.targets, label_smoothing=question.label_smoothing, holds_texts=is_text(question.model))
    return dataclasses.replace(facts, model=answer), model_facts(task, question.model, shape=question.shape)


def _with(facts: Facts, decided: Callable[[], RunConfig]) -> Facts:
    """`facts` with the settings that `decided()` returns, or with the problem that it raises."""
    try:
        return dataclasses.replace(facts, config=decided())
    except ValueError as error:
        return dataclasses.replace(facts, found_wrong=(*facts.found_wrong, str(error)))


def _decided(facts: Facts, counts: ModelFacts, gpus: int, tell: Callable[[str], None]) -> RunConfig:
    config = facts.config
    return settled(
        config,
        here(use_gpus=gpus > 0 and config.cluster.gpus_per_worker != 0),
        has_depthwise=counts.has_depthwise,
        images=images_of(facts.manifest, config.data) if facts.manifest is not None and facts.shape is not None else None,
        workers=facts.workers or 1,
        tell=tell,
    )


def _cannot_be_planned(facts: Facts) -> bool:
    """Whether the data or the settings do not allow to say what would run."""
    return bool(facts.looked is None or (facts.manifest is not None and facts.shape is None) or problems_of(facts))


def _workers(config: RunConfig, gpus: int, address: str) -> int:
    """The largest number of workers. ValueError if they do not fit this machine; what a cluster has is not asked."""
    wanted = worker_count(config)
    if address:
        return wanted or max(1, gpus)
    return plan_resources(config.workers, config.cluster, ClusterHardware(local=True, nodes=1, cpus=usable_cpus(), gpus=gpus)).most


def _devices(workers: int, gpus: int) -> Devices:
    return Devices(
        workers=workers,
        name=torch.cuda.get_device_name(0) if gpus else "CPU",
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if gpus else None,
    )


# --- data that are not converted yet --------------------------------------------------------------------------------------------------


def data_table(looked: Looked, config: RunConfig) -> Table:
    """What a conversion of the source would hold, by the headers of its files."""
    manifest = looked.manifest
    assert manifest is not None
    shown = Table(title="What the source holds (looked at, not converted yet)", title_justify="left", show_header=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")

    def add(name: str, lines: Sequence[str]) -> None:
        if lines:
            shown.add_row(name, Text("\n".join(on_one_line(line, 300) for line in lines)))

    add("Source", [f"{config.data.path} ({manifest.source})"])
    add("Images", [", ".join(f"{name} {number(split.count)}" for name, split in manifest.splits.items())])
    add("Classes", _classes(looked))
    add("Sizes", _sizes(manifest.image_sizes))
    left_out = [f"{bad.split} {bad.key}: {bad.reason}" for bad in looked.bad[:SHOWN_LEFT_OUT]]
    rest = [f"and {number(len(looked.bad) - SHOWN_LEFT_OUT)} more"] if len(looked.bad) > SHOWN_LEFT_OUT else []
    add("Left out", [counted(len(looked.bad), "image"), *left_out, *rest] if looked.bad else [])
    add("Not read", list(looked.not_read[:SHOWN_LEFT_OUT]))
    return shown


def _sizes(known: Mapping[str, int]) -> list[str]:
    if not known:
        return []
    common = sorted(known.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{each} ({counted(count, 'image')})" for each, count in common[:SHOWN_SIZES])
    if len(common) <= SHOWN_SIZES:
        return [f"{counted(len(common), 'size')} (height x width): {listed}"]
    by_area = sorted(known, key=lambda each: math.prod(map(int, each.split("x"))))
    return [f"{number(len(common))} sizes (height x width), from {by_area[0]} to {by_area[-1]}; the most frequent: {listed}"]


def _classes(looked: Looked) -> list[str]:
    target = looked.targets[0]
    if len(looked.targets) > 1 or not target.classes or looked.class_counts is None:
        return [f"{each.name}: {counted(len(each.classes), 'class', 'classes') if each.classes else each.kind}" for each in looked.targets]
    totals = [sum(counts) for counts in zip(*looked.class_counts.values(), strict=True)]
    tested = looked.class_counts.get("test") or [0] * len(totals)
    each = [f"{name} {number(all_of)} ({number(test)} to test)" for name, all_of, test in zip(target.classes, totals, tested, strict=True)]
    more = [f"and {number(len(each) - SHOWN_CLASSES)} more"] if len(each) > SHOWN_CLASSES else []
    return [f"{counted(len(each), 'class', 'classes')}: {', '.join([*each[:SHOWN_CLASSES], *more])}"]

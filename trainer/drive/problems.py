"""What stands against a run before it starts: one list of checks, which the run and its dry run share, so that neither accepts what the
other refuses. Called by start.py and dry_run.py; survey.py finds the facts.

Each check is a pure function from the facts to its problem, or None. All of them are asked, and a user learns all problems at once instead
of one after the other. A fact that is not known yet is None, and a check that needs it finds nothing.
"""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

from dataio.manifest import Manifest, image_hw, image_size_of, shape_of
from dataio.quarantine import Quarantine, TooManyBadSamples
from dataio.scan import Looked
from dataio.selection import Selected, selected_counts
from dataio.unlabelled import problem_of_sizes
from trainer.drive.check import Checked, Refused
from trainer.drive.disk_room import judge, state_bytes
from trainer.runs.choice import rule_of
from trainer.settings.balance import balanced, check_balance
from trainer.settings.length import length_of
from trainer.settings.photos import Choice, choice_of
from trainer.settings.rules import validate
from trainer.settings.second_stream import check_unlabelled
from trainer.settings.selection import problem_of_splits
from trainer.settings.spec import order_of, total_steps_of
from trainer.settings.texts import problem_of_field
from trainer.settings.tree import RunConfig
from trainer.settings.units import size

MOST_LEFT = 0.001
"""Of the statistics that a BatchNorm begins with, what may be left at a run's end. They begin at a variance of 1, and a deep layer's own
may be a hundredth of that: torchvision's mobilenet_v3_small (momentum 0.01) learned the quickstart's images in 440 steps, which leave
0.012, and its tests were at chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Free bytes of a local folder, or of the nearest one above it that exists."""

    where: str
    free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a run before it starts."""

    config: RunConfig
    workers: int | None = None
    """The most that there may be."""
    is_new: bool = True
    """The run was never started. One that was goes on by the rules by which it began."""
    saved: RunConfig | None = None
    """The settings that the run was started with, if it was and is known by its name."""
    found_wrong: tuple[str, ...] = ()
    """Problems that came up while the facts were looked for: a storage that cannot be written to, data that are not there."""
    looked: Looked | None = None
    unlabelled: Looked | None = None
    """The images of `data.unlabelled`."""
    model: Checked | Refused | None = None
    storage_room: Room | None = None
    """None for a remote storage."""
    has_spill: bool = False
    """Another disk of the node takes what the storage does not."""
    root_room: Room | None = None
    """Where the data will be converted into."""
    has_checkpoint: bool | None = None

    @property
    def manifest(self) -> Manifest | None:
        """Of the data as the run sees them: with the chosen training images, if some are chosen."""
        return self._selected[0]

    @property
    def train_counts(self) -> Sequence[int]:
        """Training images of each class, as the run sees them; empty where nobody knows."""
        return self._selected[1]

    @property
    def selected(self) -> Selected | None:
        """What is chosen of the training images; None: all of them, or nobody knows."""
        return self._selected[2]

    @property
    def _selected(self) -> tuple[Manifest | None, Sequence[int], Selected | None]:
        whole = self.looked.manifest if self.looked is not None else None
        counts = (self.looked.class_counts or {}).get("train", ()) if self.looked is not None else ()
        if whole is None:
            return None, counts, None
        try:
            manifest, by_class, found = selected_counts(whole, counts, self.config.data)
        except ValueError:  # `choice` says so
            return whole, counts, None
        return manifest, (by_class[0] if found is not None else counts), found

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(height, width) of the decoded images, (tokens,) of the longest text."""
        try:
            return shape_of(self.manifest, self.config.data) if self.manifest is not None else None
        except ValueError:
            return None


Check = Callable[[Facts], str | None]


def problems_of(facts: Facts) -> list[str]:
    """All that is wrong, each once, in the order in which a user would mend it."""
    found = [*facts.found_wrong, *(problem for check in CHECKS if (problem := check(facts)) is not None)]
    return list(dict.fromkeys(found))


def refuse(problems: Sequence[str]) -> None:
    """ValueError that lists all problems, if there are any."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        listed = "".join(f"\n- {problem}".replace("\n", "\n  ").replace("\n  - ", "\n- ", 1) for problem in problems)
        raise ValueError(f"{len(problems)} things stand against this run:{listed}")


def refuse_if_wrong(facts: Facts) -> None:
    refuse(problems_of(facts))


# --- the checks -----------------------------------------------------------------------------------------------------------------------


def bad_samples(facts: Facts) -> str | None:
    return _too_many(facts, facts.looked)


def bad_unlabelled(facts: Facts) -> str | None:
    problem = _too_many(facts, facts.unlabelled)
    return f"data.unlabelled: {problem}" if problem else None


def _too_many(facts: Facts, looked: Looked | None) -> str | None:
    if looked is None:
        return None
    quarantine = Quarantine(facts.config.data.max_bad_fraction, None)
    quarantine.restore(looked.bad)
    try:
        quarantine.finish(looked.samples)
    except TooManyBadSamples as error:
        return str(error)
    return None


def unlabelled(facts: Facts) -> str | None:
    """Images without labels are for one label, and come in the labelled images' size."""
    if facts.looked is None:
        return None
    try:
        check_unlabelled(facts.config, facts.looked.targets)
    except ValueError as error:
        return str(error)
    if facts.unlabelled is None or facts.unlabelled.manifest is None or facts.shape is None:
        return None
    return problem_of_sizes(facts.unlabelled.manifest, facts.config.data, image_hw(facts.shape))


def splits(facts: Facts) -> str | None:
    if facts.manifest is None:
        return None
    there = facts.manifest.splits
    if "test" not in there:
        return (
            f"{facts.config.data.path} has the splits {', '.join(there)}, and a run is evaluated on test; convert the source again, which "
            "holds one out of train where there is none"
        )
    if lacking := [name for name in ("train", "test") if name in there and not there[name].count]:
        fix = "hold out more (--data.test-fraction)" if lacking == ["test"] else "look at why they are left out"
        return f"{facts.config.data.path} has no usable {' and no usable '.join(lacking)} {facts.manifest.unit.removesuffix('s')}; {fix}"
    return None


def field(facts: Facts) -> str | None:
    """A model of texts is for texts, and with the tokens that it knows."""
    return problem_of_field(facts.config, facts.manifest) if facts.manifest is not None else None


def choice(facts: Facts) -> str | None:
    whole = facts.looked.manifest if facts.looked is not None else None
    if whole is None or "train" not in whole.splits or not whole.splits["train"].count:
        return None
    try:
        selected_counts(whole, (), facts.config.data)
    except ValueError as error:
        return str(error)
    return None


def sizes(facts: Facts) -> str | None:
    if facts.manifest is None or not facts.manifest.image_sizes:
        return None
    try:
        image_size_of(facts.manifest, facts.config.data)
    except ValueError as error:
        return str(error)
    return None


def settings(facts: Facts) -> str | None:
    """Rules between settings, workers and data: the batch, the crop, the warm-up."""
    try:
        validate(facts.config, workers=facts.workers, shape=facts.shape, total_steps=total_steps(facts) if facts.is_new else None)
    except ValueError as error:
        return str(error)
    return None


def balance(facts: Facts) -> str | None:
    """Balancing is of the classes of one label, and names classes that there are."""
    if facts.looked is None:
        return None
    try:
        check_balance(facts.config, facts.looked.targets)
    except ValueError as error:
        return str(error)
    return None


def selection(facts: Facts) -> str | None:
    """What the best weights are chosen by, and from which split."""
    if facts.manifest is not None and (problem := problem_of_splits(facts.config, facts.manifest)):
        return problem
    if facts.looked is None or not isinstance(facts.model, Checked):  # without data the model was built for a task that stands in
        return None
    try:
        rule_of(facts.config.train, facts.model.task)
    except ValueError as error:
        return str(error)
    return None


def model(facts: Facts) -> str | None:
    return facts.model.message if isinstance(facts.model, Refused) else None


def resume(facts: Facts) -> str | None:
    run, where = facts.config.run, facts.config.storage
    if facts.has_checkpoint is None or not run:
        return None
    if facts.config.resume == "must" and not facts.has_checkpoint:
        return f"--resume must, but run {run!r} in {where} has no checkpoint; give --run NAME of one that has"
    if facts.config.resume == "never" and facts.has_checkpoint:
        return f"--resume never, but run {run!r} in {where} has a checkpoint; give another --run NAME"
    return None


def room_for_checkpoints(facts: Facts) -> str | None:
    room = facts.storage_room
    if room is None or not isinstance(facts.model, Checked):
        return None
    needed = state_bytes(facts.config, facts.model.weights_bytes, facts.model.resting_bytes)
    keep = facts.config.cluster.keep_checkpoints
    if judge(free_bytes=room.free_bytes, state_bytes=needed, keep=keep, has_already=0, has_spill=facts.has_spill) != "refuse":
        return None
    return (
        f"storage {room.where!r} has {size(room.free_bytes)} free, and a checkpoint of this run takes {size(needed)}; free some space, or "
        "give a larger disk with --storage"
    )


def room_for_data(facts: Facts) -> str | None:
    """Images are stored as they are, so the converted data take what the source takes."""
    room, looked = facts.root_room, facts.looked
    if room is None or looked is None or looked.is_converted or looked.source_bytes <= room.free_bytes:
        return None
    return (
        f"data.root={room.where!r} has {size(room.free_bytes)} free, and the converted data take {size(looked.source_bytes)}; free some "
        "space, or name a folder elsewhere with --data.root"
    )


CHECKS: tuple[Check, ...] = (
    bad_samples,
    bad_unlabelled,
    splits,
    field,
    choice,
    sizes,
    settings,
    balance,
    unlabelled,
    selection,
    model,
    resume,
    room_for_checkpoints,
    room_for_data,
)


def with_balance(facts: Facts) -> tuple[Facts, tuple[str, ...]]:
    """With `data.balance` decided as far as the data are known, and what the user should know of the classes. What does not fit stays:
    `balance` says so."""
    looked = facts.looked
    if looked is None:
        return facts, ()
    try:
        found = balanced(facts.config, looked.targets, facts.train_counts)
    except ValueError:
        return facts, ()
    return replace(facts, config=found.config), found.said


def choice_for(facts: Facts, given: Set[str], recipes: tuple[str, ...]) -> Choice:
    """What the rule for photographs chooses (trainer.settings.photos); nothing while the data are not known."""
    if facts.manifest is None:
        return Choice(config=facts.config, chosen={})
    return choice_of(facts.config, facts.manifest, given=given, recipes=recipes, workers=facts.workers, saved=facts.saved)


def with_length(facts: Facts, from_recipes: Set[str]) -> tuple[Facts, tuple[str, ...]]:
    """With the settings that the number of training images decides, and what the user should know of them. Settings that do not fit stay:
    `settings` says so."""
    try:
        length = length_of(facts.config, _known(facts.manifest), workers=facts.workers or 0, from_recipes=from_recipes, is_new=facts.is_new)
    except ValueError:
        return facts, ()
    return replace(facts, config=length.config), length.said


def _known(manifest: Manifest | None) -> Manifest:
    """ValueError if nothing is known of the training images."""
    if manifest is None or "train" not in manifest.splits or not manifest.splits["train"].count:
        raise ValueError("no training images")
    return manifest


def total_steps(facts: Facts) -> int | None:
    """Of the whole run, as far as the data are known."""
    try:
        return total_steps_of(facts.config, order_of(facts.config, _known(facts.manifest), facts.workers or 0).steps_per_epoch)
    except ValueError:  # the settings' own problem
        return None


def said_of_norms(config: RunConfig, model: Checked | Refused | None, steps: int | None) -> list[str]:
    """What the user should know of a model that begins at random, and whose tests would be of what it began with."""
    if not isinstance(model, Checked) or not model.norm_momentum or not steps or config.train.max_steps:
        return []
    left = (1 - model.norm_momentum) ** steps
    if left <= MOST_LEFT:
        return []
    enough = math.ceil(math.log(MOST_LEFT) / math.log(1 - model.norm_momentum))
    return [
        f"warning: {config.model.name} begins at random, and its BatchNorm forgets that slowly (momentum {model.norm_momentum:g}): "
        f"after this run's {steps:,} steps {100 * left:.1f} % of its statistics are still those of the beginning, so tests can be far "
        f"worse than the training. Train {enough:,} steps or more, or begin with weights (--model.weights)"
    ]

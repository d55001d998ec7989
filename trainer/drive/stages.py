"""The stages from the user's request to a run under way: frozen values, each made once. trainer/run.py makes Asked, start.py the others.

Asked      the settings, the command and the environment
WithData   the data and the storage are open
Placed     the largest number of workers, hence the run's name and what the storage holds of it
Decided    the cluster, what each worker gets of it, and what the devices decided
Begun      the run is claimed and in the journal; its checkpoints, and the one to go on from
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.journal import Journal
from cluster.storage import Storage
from cluster.store import Commit, Store
from dataio.config import PIN
from dataio.manifest import USUAL_SIDE, Manifest
from dataio.parquet import Dataset
from dataio.schema import single_label
from dataio.texts import padded
from trainer.drive.check import Question
from trainer.drive.identity import Found, find
from trainer.drive.problems import Facts
from trainer.drive.record import Identity
from trainer.settings.packages import lacking
from trainer.settings.texts import is_text
from trainer.settings.tree import RunConfig, TaskConfig
from trainer.tasks.info import TaskInfo

if TYPE_CHECKING:
    from cluster.launch import ClusterHardware, Resources


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What this process knows besides its arguments. trainer/run.py reads it."""

    ray_address: str
    """Address of the cluster to join if the settings name none; "" starts a Ray for this run alone."""
    in_job: bool
    """Ray started this process as a job."""
    is_verbose: bool
    """Show the output of Ray's processes."""
    cpus: int
    process_started: float
    """Unix time. A run's seconds include its imports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the user asked for."""

    config: RunConfig
    prefix: str
    """How the run's automatic name begins."""
    command: str
    environment: Environment
    from_recipes: frozenset[str] = frozenset()
    """The settings that nobody but a shipped recipe has set."""
    recipes: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
    """The settings that flags have set."""
    said: tuple[str, ...] = ()
    """What was chosen for the data (trainer.settings.photos), a line each."""

    def taught_by(self, teacher: str) -> "Asked":
        """With the teacher as `survey` found it."""
        return replace(self, config=replace(self.config, train=replace(self.config.train, teacher=teacher)))

    def with_unlabelled(self, pinned: str) -> "Asked":
        """With the images without labels as they were found and converted."""
        return replace(self, config=replace(self.config, data=replace(self.config.data, unlabelled=pinned)))

    @property
    def address(self) -> str:
        """Address of the cluster to join; "" starts a Ray for this run alone."""
        return self.config.cluster.address or self.environment.ray_address


@dataclass(frozen=True, kw_only=True, slots=True)
class WithData:
    """The data and the storage are open."""

    asked: Asked
    dataset: Dataset
    location: str
    """Folder or URI of the data set."""
    shape: tuple[int, ...]
    """(height, width) of the decoded images, (tokens,) of the longest text."""
    storage: Storage
    weights: str
    """SHA-256 of the weights file; "" if `model.weights` names none."""
    second: Dataset | None = None
    """The images without labels."""

    @property
    def fingerprint(self) -> str:
        return self.dataset.manifest.fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """The run has a name. The devices decide what is left at auto in `config`."""

    data: WithData
    config: RunConfig
    workers: int
    """Largest number of workers that there may be."""
    found: Found
    said: tuple[str, ...] = ()
    """What the user should know of the run's length."""

    @property
    def has_finished(self) -> bool:
        return self.found.has_finished_as(self.config)

    @property
    def question(self) -> Question:
        return question_of(self.config, self.data.dataset.manifest, self.data.shape)

    def is_outdated(self, workers: int) -> bool:
        """Whether the largest number of workers is now another, or another process has started or ended this run since."""
        return workers != self.workers or find(self.data.storage, self.config.run) != self.found


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """Everything is decided."""

    config: RunConfig
    command: str
    dataset: Dataset
    location: str
    is_shared: bool
    """Every node can read the data set at `location`."""
    storage: Storage
    hardware: "ClusterHardware"
    resources: "Resources"
    task: TaskInfo
    identity: Identity
    said: tuple[str, ...] = ()
    """What was chosen for the data of a new run, a line each."""
    second: Dataset | None = None
    """The images without labels."""

    @property
    def fingerprint(self) -> str:
        return self.dataset.manifest.fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """The run is this driver's: claimed, its settings in its folder, its start in its journal."""

    journal: Journal
    store: Store
    generation: int
    """Number of this driver's claim on the run. A driver with a newer claim has taken the run over."""
    start: Commit | None
    """The commit to go on from; None starts at step 0."""


def question_of_facts(facts: Facts) -> Question:
    """The same question before the data are converted, or of data that cannot be read: then it is about the model alone."""
    config, looked = facts.config, facts.looked
    model = replace(config.model, weights="none") if lacking(config.model) else config.model  # what is lacking is said already
    return Question(
        task=config.task if looked is not None else TaskConfig(),
        targets=looked.targets if looked is not None else single_label(("a", "b")),
        label_smoothing=config.optim.label_smoothing,
        model=model,
        shape=facts.shape or usual_shape(config),
        seed=config.train.seed_of_layers,
        loss=config.optim.loss,
        augment=config.data.augment,
        layer_decay=config.optim.layer_decay,
        # What is wrong with one that was not found, or with the data, is said already.
        teacher=config.train.teacher if looked is not None and PIN in config.train.teacher else "",
    )


def usual_shape(config: RunConfig) -> tuple[int, ...]:
    """What to build the model for while nothing is known of the data."""
    return (padded(config.data.max_tokens),) if is_text(config.model) else (config.data.image_size or USUAL_SIDE,) * 2


def question_of(config: RunConfig, manifest: Manifest, shape: tuple[int, ...]) -> Question:
    """The question for trainer.drive.check: can the run's model be built?"""
    return Question(
        task=config.task,
        targets=manifest.targets,
        label_smoothing=config.optim.label_smoothing,
        model=config.model,
        shape=shape,
        seed=config.train.seed_of_layers,
        loss=config.optim.loss,
        augment=config.data.augment,
        layer_decay=config.optim.layer_decay,
        teacher=config.train.teacher,
    )

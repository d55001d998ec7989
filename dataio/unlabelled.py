"""The second stream's images, without labels (`data.unlabelled`): looked at, converted, opened, and compared with the first's. The driver
calls it before a run starts, the ranks open what it found.

They are a data set like the first, in the same form and with the same limits on bad images; whatever it stores, only its split `unlabelled`
is read, or `train` if there is none, and never a split that a model is tested on. A pin, `LOCATION@sha256:FINGERPRINT`, says where the
images are and which they are.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from dataio.config import PIN, DataConfig, unpinned
from dataio.conversion import Progress, conversion_identities
from dataio.manifest import MANIFEST_NAME, Manifest
from dataio.parquet import Dataset, open_dataset
from dataio.prepared import Prepared, prepared
from dataio.remote import is_remote, is_uri, local_path
from dataio.scan import Looked, scan
from dataio.schema import UNLABELLED, Target, single_label
from dataio.sources import HasFiles, Source
from dataio.sources.unlabelled import UNKNOWN, open_unlabelled


class UnlabelledError(ValueError):
    """Unlabelled images that are not where the run has them from, or are others."""

    failure_kind = "user"


def prepare_unlabelled(config: DataConfig, on_progress: Callable[[Progress], None] | None = None) -> Prepared:
    """Opens the data set of `config.unlabelled`, converting it into `config.root` first if necessary. Raises what `prepared` raises, and
    ValueError if a pin names other images than those that are there."""
    location, fingerprint = unpinned(config.unlabelled)
    if fingerprint:
        return Prepared(location=location, dataset=open_pinned(config.unlabelled))
    found = prepared(replace(config, path=location), on_progress, source=partial(_open, config))
    return replace(found, dataset=only_unlabelled(found.dataset))


def open_pinned(pinned: str) -> Dataset:
    """The images that a pin names. ValueError if they are others now."""
    location, fingerprint = unpinned(pinned)
    dataset = open_dataset(location)
    if dataset.manifest.fingerprint != fingerprint:
        raise UnlabelledError(
            f"data.unlabelled: {dataset.where} holds other images ({dataset.manifest.fingerprint[:12]}) than before ({fingerprint[:12]}); "
            "put the same ones back, or start another run with --run NAME"
        )
    return only_unlabelled(dataset)


def pin(found: Prepared) -> str:
    """What names the images of `found`, wherever this is read."""
    return f"{found.location}{PIN}{found.dataset.manifest.fingerprint}"


def only_unlabelled(dataset: Dataset) -> Dataset:
    """The split to read of a data set, as its only one."""
    return dataset.only(UNLABELLED if UNLABELLED in dataset.manifest.splits else "train", called=UNLABELLED)


def look_at_unlabelled(config: DataConfig) -> Looked:
    """As dataio.scan.look_at: what is known of the images before they are converted; nothing is converted or downloaded."""
    location, fingerprint = unpinned(config.unlabelled)
    if fingerprint:
        return _looked(open_pinned(config.unlabelled))
    if is_remote(location):
        return _looked(only_unlabelled(open_dataset(location)))
    path = (local_path(location) if is_uri(location) else None) or Path(location).expanduser()
    if (path / MANIFEST_NAME).is_file():
        return _looked(only_unlabelled(open_dataset(path)))
    source = _open(config)
    for identity in conversion_identities(source, config.max_image_pixels):
        try:
            made = open_dataset(Path(config.root).expanduser() / f"{source.kind}-{identity[:16]}")
        except (ValueError, OSError):
            continue
        return replace(_looked(made), bad=made.left_out())
    if isinstance(source, HasFiles):
        return scan(source, max_image_pixels=config.max_image_pixels)
    return Looked(targets=single_label((UNKNOWN,)), manifest=None, is_converted=False)


def problem_of_sizes(manifest: Manifest, config: DataConfig, image_size: tuple[int, int]) -> str | None:
    """Why images of these sizes cannot be batched with images of `image_size` (height, width), as text: the value, the rule, the fix."""
    height, width = image_size
    others = [size for size in manifest.image_sizes if size != f"{height}x{width}"]
    if config.fit != "refuse" or not others:
        return None
    return (
        f"data.unlabelled={unpinned(config.unlabelled)[0]} holds images of {others[0]} pixels (height x width), and the run's are of "
        f"{height}x{width}; data.fit=refuse would leave them all out: say how they come to one size, e.g. --data.fit crop"
    )


def is_resized(manifest: Manifest, config: DataConfig, image_size: tuple[int, int]) -> bool:
    """Whether any of the images is brought to another size."""
    height, width = image_size
    return config.fit != "refuse" and set(manifest.image_sizes) != {f"{height}x{width}"}


def known_classes(target: Target, classes: tuple[str, ...]) -> tuple[int, ...]:
    """For each class of the images' own `target`, its number among the run's `classes`; -1 for one that the run does not know."""
    numbers = {name: number for number, name in enumerate(classes)}
    return tuple(numbers.get(name, -1) for name in target.classes)


def _open(config: DataConfig) -> Source:
    return open_unlabelled(unpinned(config.unlabelled)[0], root=Path(config.root).expanduser(), image_column=config.image_column)


def _looked(dataset: Dataset) -> Looked:
    return Looked(targets=dataset.manifest.targets, manifest=dataset.manifest, is_converted=True)

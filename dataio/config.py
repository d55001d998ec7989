"""What the data are and how a batch is made of them. Read by dataio, written by the command line (`--data.*`).

A setting's rules stand beside it, in `Annotated`; how they are written is said in docs/extending.md, how they are kept in
trainer.settings.rules.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal

Backend = Literal["auto", "dali", "torch", "numpy"]
Cache = Literal["auto", "device", "host", "none"]
Fit = Literal["refuse", "stretch", "crop"]


class Mark(Enum):
    """What a run's identity makes of a setting; one without a mark decides the weights. Read by trainer.settings.identity.

    It stands here, the lowest of the packages that mark their settings.
    """

    FREE = "free"
    """A run may go on with another value: it changes neither the weights nor the evaluation, or does so only by making other data, which
    their fingerprint tells."""
    LATER = "later"
    """It was added after runs were first named by their settings. It decides the weights, but is no part of the name while it has its
    default, so that adding it renamed no run."""
    PATH = "path"
    """A file or folder: `./` and `../` begin at the file that sets it, and the same name elsewhere is the same thing."""


FREE, LATER, PATH = Mark


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Labelled images and the batches made of them."""

    path: Annotated[str, FREE, PATH] = "cifar10"
    """`cifar10` (downloaded, hash-checked), a folder made by `dataio.convert` or its URI, or any source that `dataio.convert` takes."""
    root: Annotated[str, FREE] = "~/.cache/trainer"
    """Folder for downloads and for sources that had to be converted."""
    batch_size: int = 100
    """Images a step over all workers (global); a multiple of `train.virtual_ranks`."""
    backend: Annotated[Backend, FREE] = "auto"
    """Who crops and flips. All give the same uint8 batch; auto takes the fastest measured one for the device."""
    cache: Annotated[Cache, FREE] = "auto"
    """Where decoded images stay: on the device, on the host, nowhere (decoded every epoch); auto takes the first that fits."""
    image_size: int = 0
    """Side in pixels of the decoded images; 0 takes the size all images of the data set share."""
    fit: Fit = "refuse"
    """An image of another size is refused (quarantined), stretched, or cut to its largest centred part of the right shape and resized."""
    pad: int = 4
    """Zero pixels added on each side before the random crop; 0 turns the crop off."""
    flip: bool = True
    """Mirror each training image with probability one half."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, of pixel values scaled to [0, 1]; subtracted on the device."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, of pixel values scaled to [0, 1]; divided by on the device."""
    shuffle_window: int = 0
    """Samples shuffled together; 0 shuffles the whole data set, a number keeps reads of a large one local."""
    max_bad_fraction: Annotated[float, FREE] = 0.001
    """Quarantined fraction of the samples above which the run fails."""
    test_fraction: Annotated[float, FREE] = 0.1
    """Fraction held out for testing, by a hash of the key, where the source has no test split."""
    max_image_pixels: Annotated[int, FREE] = 89_478_485
    """Larger images (by their header) are quarantined before any decoding: a decompression bomb's guard."""

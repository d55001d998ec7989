"""What the data are and how a batch is made of them. Read by dataio, written by the command line (`--data.*`)."""

from dataclasses import dataclass
from typing import Literal

Backend = Literal["auto", "dali", "torch", "numpy"]
Cache = Literal["auto", "device", "host", "none"]
Fit = Literal["refuse", "stretch", "crop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Labelled images and the batches made of them."""

    path: str = "cifar10"
    """`cifar10` (downloaded, hash-checked), a folder made by `dataio.convert` or its URI, or any source that `dataio.convert` takes."""
    root: str = "~/.cache/trainer"
    """Folder for downloads and for sources that had to be converted."""
    batch_size: int = 100
    """Images a step over all workers (global); a multiple of `train.virtual_ranks`."""
    backend: Backend = "auto"
    """Who crops and flips. All give the same uint8 batch; auto takes the fastest measured one for the device."""
    cache: Cache = "auto"
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
    max_bad_fraction: float = 0.001
    """Quarantined fraction of the samples above which the run fails."""
    test_fraction: float = 0.1
    """Fraction held out for testing, by a hash of the key, where the source has no test split."""
    max_image_pixels: int = 89_478_485
    """Larger images (by their header) are quarantined before any decoding: a decompression bomb's guard."""

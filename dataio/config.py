"""Settings of the data and of the batches made of them. dataio reads them; the command line writes them (`--data.*`).

A setting carries its rules in `Annotated`: docs/extending.md says how to write them, trainer.settings.rules checks them.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from dataio.balance import balance_of, class_weights_of
from dataio.fold import fold_of, part_of

Backend = Literal["auto", "dali", "torch", "numpy"]
Cache = Literal["auto", "device", "host", "none"]
Fit = Literal["refuse", "stretch", "crop"]
Remainder = Literal["auto", "spread", "last"]
Colour = Literal["", "black", "gray", "white"]
"""Behind transparent images; "" for none, which drops their alpha."""
Background = Literal["auto", "", "black", "gray", "white"]
Crop = Literal["pad", "resized"]
Policy = Literal["none", "trivial", "rand"]
AugmentBackend = Literal["auto", "torch", "dali"]
TooLong = Literal["cut", "refuse"]


DEVICE_FRACTION = 0.4
"""Fraction of the free device memory for decoded samples; the rest is for the model, its activations and the allocator."""


class Mark(Enum):
    """Properties of a setting other than its values, written in its `Annotated`. A setting without a mark decides the weights.

    Defined here because dataio is the lowest of the packages that mark their settings.
    """

    FREE = "free"
    """A run may continue with another value. The setting changes neither the weights nor the evaluation, or changes them only by making
    other data, which the data's fingerprint shows."""
    LATER = "later"
    """Added after runs were first named by their settings, or free until then. It decides the weights, but is not part of the name while it
    has its default; so that renamed no run."""
    PATH = "path"
    """A file or folder. `./` and `../` are relative to the file that sets it. It counts by its content, not by where it lies."""
    AUTO = "auto"
    """A number for which the word `auto` is accepted as well; it stands for -1."""


FREE, LATER, PATH, AUTO = Mark


@dataclass(frozen=True, slots=True)
class Before:
    """What the runs do that were begun before there was this setting. Its default is an auto, which each new run decides once and writes
    down: so a run that says nothing of the setting is an older one, and `value` is what it was started with."""

    value: Any


PIN = "@sha256:"
"""In a setting that the driver has looked up: between a place and the hash of what is there."""


def unpinned(given: str) -> tuple[str, str]:
    """(place, hash) of a setting that may be pinned; without a pin the hash is ""."""
    place, is_pinned, sha256 = given.rpartition(PIN)
    return (place, sha256) if is_pinned else (given, "")


def targets_of(text: str) -> tuple[tuple[str, str], ...]:
    """Parses `data.targets` into (column, kind) pairs in order; the kind is empty where the data decide it. ValueError for other text."""
    from dataio.schema import KINDS  # here: it needs numpy, which would slow down --help

    pairs: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, colon, kind = (word.strip() for word in part.rpartition(":"))
        if not colon:
            name, kind = kind, ""
        if not name:
            raise ValueError(f"data.targets={text!r} names no column in {part!r}; write NAME or NAME:KIND, separated by commas")
        if colon and kind not in KINDS:
            raise ValueError(f"data.targets={text!r}: {kind!r} is no kind of target; it must be one of {', '.join(KINDS)}")
        if name in pairs:
            raise ValueError(f"data.targets={text!r} names {name} twice; name each column once")
        pairs[name] = kind
    return tuple(pairs.items())


def module_and_function(text: str) -> tuple[str, str]:
    """Parses `module:function`, a function of the user's own. ValueError for other text."""
    module, colon, name = text.partition(":")
    if not colon or not all(word.isidentifier() for word in (*module.split("."), name)):
        raise ValueError(f"{text!r} names no function; write module:function, such as my_package.my_module:my_function")
    return module, name


def augment_of(text: str) -> tuple[str, str] | None:
    """`data.augment` as (module, function); None for ""."""
    try:
        return module_and_function(text) if text else None
    except ValueError as error:
        raise ValueError(f"data.augment={error}") from None


def crop_scale_of(value: tuple[float, float]) -> tuple[float, float]:
    """`data.crop_scale` as it is. ValueError for an empty range."""
    return _ordered("data.crop_scale", value, "0.08 1 is usual, 0.5 1 is mild")


def crop_ratio_of(value: tuple[float, float]) -> tuple[float, float]:
    """`data.crop_ratio` as it is. ValueError for an empty range."""
    return _ordered("data.crop_ratio", value, "0.75 1.3333 is usual, 1 1 keeps squares")


def jitter_of(value: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """`data.jitter` as it is. ValueError for a hue that goes round the circle."""
    if value[3] > 0.5:
        raise ValueError(f"data.jitter: the hue's shift of {value[3]:g} must be at most 0.5, which is half the circle; 0.1 is usual")
    return value


def _ordered(key: str, value: tuple[float, float], usual: str) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"{key}={value[0]:g} {value[1]:g} is an empty range: the smaller number comes first; {usual}")
    return value


def text_columns_of(text: str) -> tuple[str, ...]:
    """`data.text_column` as the columns' names: none, one, or the two of pairs. ValueError for other text."""
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if len(names) > 2 or "" in names or len(set(names)) != len(names):
        raise ValueError(f"data.text_column={text!r} names no text and no pair of texts; give one column, or two with a comma between them")
    return names


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Labelled images or texts, and the batches made of them."""

    path: Annotated[str, FREE, PATH, MinLen(1)] = "cifar10"
    """`cifar10` (downloaded, hash-checked), a folder made by `dataio.convert` or its URI, or any source that `dataio.convert` takes."""
    root: Annotated[str, FREE, MinLen(1)] = "~/.cache/trainer"
    """Folder for downloads and for sources that had to be converted."""
    targets: Annotated[str, FREE, targets_of] = ""
    """Columns to learn, as `NAME` or `NAME:KIND` separated by commas; the kinds are `label` (one class), `labels` (several classes or none)
    and `number`. Empty uses the source's own single label. Applied when a source is converted."""
    image_column: Annotated[str, FREE] = ""
    """Column of a table or of Parquet files that has the images, or names their files; empty finds it by its usual names."""
    label_column: Annotated[str, FREE] = ""
    """Column of a table or of Parquet files that has the one label to learn; empty finds it by its usual names. Instead of `targets`."""
    text_column: Annotated[str, FREE, text_columns_of] = ""
    """Column of a table, of JSON lines or of Parquet files that has the texts, or two with a comma between them for pairs of texts; empty
    finds it by its usual names."""
    tokenizer: Annotated[str, FREE, PATH] = ""
    """The file `tokenizer.json` of the tokenizers library, or a folder with it, by which texts are made into tokens when a source is
    converted: the data are texts then. Empty: a run takes that of its model (`model.name=hf/...`); of any other model the data are
    images."""
    max_tokens: Annotated[int, FREE, Ge(8), "128 is the default"] = 128
    """Most tokens of a text, with those that the tokenizer adds. Applied when a source is converted."""
    too_long: Annotated[TooLong, FREE] = "cut"
    """What becomes of a text with more: its beginning is kept (`cut`), or it is quarantined (`refuse`). Applied when a source is
    converted, which counts them."""
    sort_steps: Annotated[int, LATER, Ge(1), "1 sorts nothing"] = 32
    """Steps whose texts are sorted by length among themselves, so that a step holds texts of similar length and pads little; 1 leaves
    the order as it is drawn. Each text is still seen once an epoch."""
    unlabelled: Annotated[str, LATER, PATH] = ""
    """More images of the same kind, without labels, from which a classification learns too (docs/unlabelled.md): a folder of images,
    Parquet files, any other source, or a folder or URI made by `dataio.convert`. Empty: none. If they lie in class folders, these are used
    to say in the report how good the model's guesses were, and for nothing else."""
    batch_size: Annotated[int, Ge(1), "100 is the default"] = 100
    """Images, or texts, a step over all workers (global); a multiple of `train.virtual_ranks`."""
    remainder: Annotated[Remainder, LATER, Before("last")] = "auto"
    """The images of an epoch that make no whole batch: a short `last` batch, or `spread` over the epoch, whose batches then differ by one
    image at most. `auto` spreads them if the last batch would be under half of the others: BatchNorm cannot normalise a few images, and
    their step moves the weights as far as a full one."""
    balance: Annotated[str, LATER, balance_of] = "none"
    """For a classification whose classes differ in size: `weights` lets all of them count alike in the loss, `logit_adjustment` (Menon et
    al. 2021) adds the logarithm of each class's share to its logit in training; `auto` is `logit_adjustment` if the largest class has 3
    times the images of the smallest or more, else `none`. A sampler is not offered: an epoch has each image once."""
    class_weights: Annotated[str, LATER, class_weights_of] = ""
    """Weights of a classification's classes in the loss as `NAME=WEIGHT,NAME=WEIGHT`; the others weigh 1. They are scaled to a mean of 1
    over the training images. Instead of `balance`."""
    backend: Annotated[Backend, FREE] = "auto"
    """Library that crops and flips. All give the same uint8 batch; auto uses the fastest measured one for the device."""
    cache: Annotated[Cache, FREE] = "auto"
    """Where decoded images stay: on the device, on the host, nowhere (decoded every epoch); auto uses the first that fits."""
    image_size: Annotated[int, Ge(0), "0 takes the size that all images share"] = 0
    """Side in pixels of the decoded images; 0 uses the size that all images of the data set share."""
    fit: Fit = "refuse"
    """What to do with an image of another size: refuse it (quarantine), stretch it, or crop its largest centred part of the right shape and
    resize that."""
    background: Annotated[Background, LATER, Before("")] = "auto"
    """Colour behind transparent images; `auto` is white. Empty drops their alpha channel: what is transparent shows the colour stored below
    it, which is often black everywhere."""
    pad: Annotated[int, Ge(0), "0 turns the random crop off"] = 4
    """Zero pixels added on each side before the random crop; 0 turns the crop off."""
    flip: bool = True
    """Mirror each training image with probability one half."""
    crop: Annotated[Crop, LATER] = "pad"
    """Random crop: of the image with `pad` pixels added, or a `resized` part of it (Inception's crop), of which `crop_scale` and
    `crop_ratio` say how large; `pad` then has no effect. docs/augmentation.md says more of all augmentations."""
    crop_scale: Annotated[tuple[float, float], LATER, Interval(gt=0, le=1), crop_scale_of] = (0.08, 1.0)
    """Smallest and largest part of the image's area that `crop=resized` keeps."""
    crop_ratio: Annotated[tuple[float, float], LATER, Gt(0), crop_ratio_of] = (0.75, 4 / 3)
    """Smallest and largest ratio width / height of what `crop=resized` keeps."""
    rotate: Annotated[float, LATER, Interval(ge=0, le=180), "0 turns it off"] = 0.0
    """Rotate each training image by up to this many degrees, either way."""
    policy: Annotated[Policy, LATER] = "none"
    """Random operations on each training image: `trivial` is TrivialAugment (one of any strength), `rand` is RandAugment (`policy_ops` of
    strength `policy_magnitude`), both with torchvision's tables."""
    policy_ops: Annotated[int, LATER, Interval(ge=1, le=16), "2 is the default"] = 2
    """Operations in a row of `policy=rand`."""
    policy_magnitude: Annotated[int, LATER, Interval(ge=0, le=30), "9 is the default"] = 9
    """Strength of the operations of `policy=rand`, 30 being the most."""
    jitter: Annotated[
        tuple[float, float, float, float], LATER, Interval(ge=0, le=1), "0 turns one off, 0.4 0.4 0.4 0.1 is usual", jitter_of
    ] = (0.0, 0.0, 0.0, 0.0)
    """How far brightness, contrast, saturation and hue are changed at random, in this order."""
    erase: Annotated[float, LATER, Interval(ge=0, le=1), "0 turns it off, 0.25 is usual"] = 0.0
    """Probability with which a rectangle of a training image is erased, to `mean`."""
    augment_backend: Annotated[AugmentBackend, LATER, Before("torch")] = "auto"
    """Library that does the augmentations from `crop=resized` to `erase`, with the same draws and pixels that are a level apart at most.
    `auto` is `dali` on GPUs that decode the images anew for each epoch, else `torch`; decided once per run."""
    augment: Annotated[str, LATER, augment_of] = ""
    """An augmentation of your own, after those above, as `module:function` (docs/extending.md). Its source is part of the run's
    identity."""
    mean: Annotated[tuple[float, float, float], Interval(ge=0, le=1), "pixel values are scaled to [0, 1] before"] = (0.5, 0.5, 0.5)
    """Subtracted on the device, per channel; pixel values are scaled to [0, 1] first."""
    std: Annotated[tuple[float, float, float], Gt(0), "the images are divided by it"] = (0.5, 0.5, 0.5)
    """Divided by on the device, per channel; pixel values are scaled to [0, 1] first."""
    shuffle_window: Annotated[int, Ge(0), "0 shuffles the whole data set"] = 0
    """Samples shuffled together; 0 shuffles the whole data set, a smaller number keeps the reads of a large one local."""
    max_bad_fraction: Annotated[float, FREE, Interval(ge=0, le=1), "it is a fraction of the samples, 0.01 being one in a hundred"] = 0.001
    """Fraction of the samples that may be quarantined; above it the run fails. Up to 10 bad samples are left out in any case, as long as
    they are no more than a tenth of all; 0 allows none."""
    test_fraction: Annotated[float, FREE, Interval(gt=0, lt=1), "it is a fraction of the samples, 0.1 being one in ten"] = 0.1
    """Fraction of each class held out for testing, by a hash of the key, where the source has no test split."""
    validation_fraction: Annotated[float, FREE, Interval(ge=0, lt=1), "it is a fraction of the training samples, 0 holds out none"] = 0.0
    """Fraction of the training split held out as the validation split, class by class, where the source has none; 0 holds out none. Applied
    when a source is converted."""
    corrections: Annotated[str, FREE, PATH] = ""
    """CSV file with the columns `key`, `action` and `label`: samples to `relabel` or to `drop`, and those to `keep` as they are
    (docs/labels.md). What it changes makes another data set. Applied when a source is converted."""
    part: Annotated[float, LATER, part_of] = 1.0
    """Train on a part of the training images: up to 1 a fraction of them, above it a number of images; 1 is everything. Each class has its
    share, and a smaller part lies in a larger one (docs/labels.md)."""
    fold: Annotated[str, LATER, fold_of] = ""
    """Train on all but one fold of the training images, as `NUMBER/FOLDS`: `2/5` holds out the second of five folds, which is scored as the
    validation split. Each class has its share of every fold. Empty holds out none. `part` takes a part of what is left."""
    choice_seed: Annotated[int, LATER, Ge(0), "0 is the default"] = 0
    """Seed of the choices of `part` and `fold`, apart from `train.seed`: the same images for several seeds, or others for the same one."""
    max_image_pixels: Annotated[int, LATER, Ge(1)] = 89_478_485
    """Images with more pixels (by their header) are quarantined before decoding: protection against decompression bombs."""

    @property
    def behind(self) -> Colour:
        """The colour that `background` means."""
        return "white" if self.background == "auto" else self.background

    @property
    def padding(self) -> int:
        """Pixels that the codec adds on each side before it crops: none where the crop is a resized one, which comes later."""
        return self.pad if self.crop == "pad" else 0

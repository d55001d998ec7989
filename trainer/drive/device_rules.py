"""What `auto` means for `data.augment_backend` and `train.cuda_graphs`: rules in which the data count beside the devices. Pure. Called by
capability.py, which says what the devices are.
"""

from dataclasses import dataclass

from dataio.codecs.image.decode import decoder_device
from dataio.config import DEVICE_FRACTION, DataConfig
from dataio.manifest import Manifest, image_size_of
from trainer.settings.tree import RunConfig
from trainer.settings.units import number, size

CAPTURED_PIXELS = 512 * 32 * 32
"""A pass over fewer pixels is replayed as a CUDA graph. A pass launches about 270 kernels whatever it computes, which takes the host about
3.5 ms; 512 images of 32 pixels take an H200 about 5.7 ms. (Both estimated, for ResNet-18. A deeper network launches more and computes
more.)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The data of a run, decoded."""

    count: int
    """Over all splits."""
    height: int
    width: int

    @property
    def decoded_bytes(self) -> int:
        return self.count * self.height * self.width * 3


def images_of(manifest: Manifest, data: DataConfig) -> Images | None:
    """None for texts. ValueError where the settings leave the images' size open."""
    if manifest.texts is not None:
        return None
    height, width = image_size_of(manifest, data)
    return Images(count=sum(split.count for split in manifest.splits.values()), height=height, width=width)


def augment_backend(data: DataConfig, images: Images, *, on_gpu: bool, gpu_bytes: int | None) -> tuple[str, str]:
    """The library, and why: dali for images that a GPU decodes anew for each epoch, whose pixels DALI holds already. `gpu_bytes`: the
    memory of the smallest GPU; None if nobody knows, and then images stay there."""
    if not on_gpu:
        return "torch", "on a CPU"
    if decoder_device(images.height, images.width, fit=data.fit, device="cuda") == "cpu":
        return "torch", f"the CPU decodes images of {max(images.height, images.width)} pixels"
    if data.cache == "none":
        return "dali", "data.cache=none: the GPU decodes the images anew for each epoch"
    room = None if gpu_bytes is None else int(gpu_bytes * DEVICE_FRACTION)
    if data.cache == "auto" and room is not None and images.decoded_bytes > room:
        why = f"{size(images.decoded_bytes)} of decoded images do not stay on the GPU, whose room for them is {size(room)}"
        return "dali", why
    return "torch", "decoded images stay in memory"


def captures(config: RunConfig, images: Images, *, on_gpu: bool, workers: int) -> tuple[bool, str]:
    """Whether passes are replayed as CUDA graphs, and why; "" if there is nothing to say. They are where the host takes longer to launch a
    pass than the GPU to compute it, if Inductor records them: it launches kernels singly where a step cannot be recorded. What
    trainer.learn.capture does for steps that are not compiled is left to the user's word until a GPU has proven it."""
    train = config.train
    if not on_gpu:
        return False, ""
    virtual_ranks = train.virtual_ranks or workers
    each = config.data.batch_size // (1 if train.reduction == "ddp" else virtual_ranks)
    height, width = (config.model.image_size,) * 2 if config.model.image_size else (images.height, images.width)
    is_small = each * height * width < CAPTURED_PIXELS
    passes = f"{number(each)} images of {width}x{height} pixels go through the model at once"
    if not is_small:
        return False, f"{passes}, which keeps the GPU busy" if train.compile else ""
    if train.accumulate > 1:
        return False, "train.accumulate adds up gradients that a replay would overwrite"
    if config.data.unlabelled:
        return False, "data.unlabelled counts guesses in the step"
    if train.reduction == "ddp" and workers > 1:
        return False, "train.reduction=ddp exchanges gradients in the step"
    if not train.compile:
        return False, f"{passes}, which takes the host longer than the GPU; --train.cuda-graphs may help, and no GPU has proven it yet"
    return True, f"{passes}, which takes the GPU less than the host takes to launch it"

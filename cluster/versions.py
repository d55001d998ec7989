"""The versions that a run's bits and messages depend on. Called by preflight, and by trainer and benchmarks to record them."""

import importlib.metadata
import platform

PACKAGES = ("torch", "torchvision", "ray", "nvidia-dali-cuda130", "pyarrow", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions whose differences between nodes change results or break messages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found

"""How this machine rounds, as one hash: two machines with the same give the same weights for the same command, those with another may not.

    python -m tests.golden.probe

Which kernels run is decided by the CPU's instructions, its caches and the libraries, and by the shapes they are given. So the hash is over
the bits of what the golden runs compute: single operations, and their networks forward and backward with their batches, in fp32 and bf16,
with one thread, as a rank has. Nothing is asked of a CPU's name.
"""

import hashlib
import subprocess
import sys
from collections.abc import Iterator

from tests.e2e.running import PROJECT


def probe() -> str:
    """The hash, from a process of its own: what other tests have set in this one does not matter."""
    done = subprocess.run([sys.executable, "-m", "tests.golden.probe"], cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    import torch

    torch.set_num_threads(1)
    digest = hashlib.sha256(torch.__version__.encode())
    for tensor in results():
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    print(digest.hexdigest()[:16])


def results() -> Iterator["torch.Tensor"]:  # noqa: F821
    import torch
    from torch import nn

    torch.manual_seed(0)
    for precision in (torch.float32, torch.bfloat16):
        a, b = torch.randn(50, 1280).to(precision), torch.randn(1280, 10).to(precision)
        yield a @ b
        yield torch.softmax(a, dim=1)
        for layout in (torch.contiguous_format, torch.channels_last):
            for convolution, side in (
                (nn.Conv2d(3, 64, 3, padding=1), 32),
                (nn.Conv2d(64, 64, 3, padding=1, stride=2), 17),
                (nn.Conv2d(96, 96, 5, padding=2, groups=96), 12),
                (nn.Conv2d(192, 320, 1), 2),
            ):
                layers = nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU6()).to(memory_format=layout)
                yield from step(layers, (20, convolution.in_channels, side, side), precision, layout)
    yield torch.nn.functional.interpolate(torch.rand(20, 3, 28, 28), size=(48, 48), mode="bicubic", antialias=False)
    yield from networks()


def networks() -> Iterator["torch.Tensor"]:  # noqa: F821
    """The golden runs' own."""
    import timm
    import torch
    import torchvision

    resnet = torchvision.models.resnet18(weights=None, num_classes=10)
    resnet.conv1, resnet.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    yield from step(resnet, (10, 3, 32, 32), torch.float32, torch.contiguous_format)
    yield from step(resnet.to(memory_format=torch.channels_last), (10, 3, 32, 32), torch.bfloat16, torch.channels_last)
    for name, shape, precision in (
        ("tf_efficientnet_lite0", (25, 3, 48, 48), torch.float32),
        ("test_efficientnet", (25, 3, 28, 28), torch.float32),
        ("test_resnet", (5, 3, 64, 64), torch.bfloat16),
    ):
        model = timm.create_model(name, pretrained=False, num_classes=10, drop_path_rate=0.0)
        yield from step(model.to(memory_format=torch.channels_last), shape, precision, torch.channels_last)


def step(model, shape, precision, layout) -> Iterator["torch.Tensor"]:  # type: ignore[no-untyped-def]  # noqa: F821
    """A step's outputs, gradients and statistics."""
    import torch

    images = torch.randn(shape).to(memory_format=layout)
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        outputs = model(images)
    loss = (
        outputs.float().square().mean()
        if outputs.dim() == 4
        else torch.nn.functional.cross_entropy(outputs, torch.arange(len(outputs)) % 10)
    )
    loss.backward()
    yield outputs
    yield from (parameter.grad for parameter in model.parameters())
    yield from model.buffers()


if __name__ == "__main__":
    main()

"""The tutorial in plain PyTorch: ResNet-18 on CIFAR-10, one process, one file. The peer for our `article` recipe.

    python -m benchmarks.article --data cifar-10-python.tar.gz --json

It shares no code with the packages. `--weights` starts from a given state_dict (stem and head included) and `--batches` trains on given
images, so that two programs can be compared step by step. The tutorial uses: pretrained ResNet-18 with the first convolution replaced by a
random 3x3 of stride 1, no max-pool, and a new head; random crop (padding 4) and flip; batches of 100; SGD, lr 0.001, momentum 0.9;
cross-entropy; 10 epochs.
"""

import argparse
import io
import json
import pickle
import platform
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

NORMALIZE = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
AUGMENT = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, padding=4), NORMALIZE])


class BatchUnpickler(pickle.Unpickler):
    """Reads the types in a CIFAR-10 batch (dicts, lists, bytes, one array) and nothing else."""

    ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {
            (f"numpy.{core}.{module}", name)
            for core in ("core", "_core")
            for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 batch")
        return super().find_class(module, name)


def read_batches(path: Path) -> dict[str, bytes]:
    """The batch files by name, from the tar or from the folder where it was extracted."""
    if path.is_dir():
        folder = path / "cifar-10-batches-py" if (path / "cifar-10-batches-py").is_dir() else path
        return {file.name: file.read_bytes() for file in folder.iterdir() if "_batch" in file.name}
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if "_batch" in member.name else None
            if content is not None:
                files[Path(member.name).name] = content.read()
    return files


class Cifar10(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, batches: dict[str, bytes], train: bool, transform: Any) -> None:
        names = sorted(name for name in batches if name.startswith("data_batch") == train)
        if not names:
            raise SystemExit(
                f"--data holds no {'data_batch_*' if train else 'test_batch'}; give a CIFAR-10 tar (python version) or its folder"
            )
        parts = [BatchUnpickler(io.BytesIO(batches[name]), encoding="bytes").load() for name in names]
        flat = np.concatenate([part[b"data"] for part in parts])  # (N, 3072): planes of red, green, blue
        self.images = flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 32, 32, 3) uint8
        self.labels = [label for part in parts for label in part[b"labels"]]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(np.ascontiguousarray(self.images[index]))), self.labels[index]


def build(weights: Path | None) -> nn.Module:
    pretrained = torchvision.models.ResNet18_Weights.DEFAULT if weights is None else None
    model: nn.Module = torchvision.models.resnet18(weights=pretrained)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Linear(512, 10)
    if weights is not None:
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            model.load_state_dict(load_file(weights))
        else:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


def given_batches(path: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Reads an .npz: `images` (steps, n, 32, 32, 3) uint8, already cropped and flipped, and `labels` (steps, n)."""
    with np.load(path, allow_pickle=False) as file:
        for images, labels in zip(file["images"], file["labels"], strict=True):
            yield torch.stack([NORMALIZE(image) for image in images]), torch.from_numpy(labels.astype(np.int64))


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    model.eval()
    correct = total = 0
    for images, labels in loader:
        correct += (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
        total += len(labels)
    return correct / total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="cifar-10-python.tar.gz, or the folder it was extracted to")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument("--weights", type=Path, help="state_dict to start from (torch.save or .safetensors), stem and head included")
    parser.add_argument("--batches", type=Path, help=".npz with the batches to train on, instead of the data's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--loader-workers", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the loss and the time of each step")
    args = parser.parse_args(argv)
    if args.data is None and args.batches is None:
        parser.error("nothing to train on: give --data or --batches")

    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(args.weights).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    test_loader = None
    if args.data is not None:
        files = read_batches(args.data)
        test_loader = DataLoader(Cifar10(files, False, NORMALIZE), batch_size=100, num_workers=args.loader_workers)
    if args.batches is not None:
        epochs: Any = [given_batches(args.batches)]
    else:
        train_set = Cifar10(files, True, AUGMENT)
        train_loader = DataLoader(train_set, batch_size=100, shuffle=True, num_workers=args.loader_workers)
        epochs = [train_loader] * args.epochs

    losses: list[float] = []
    times: list[float] = []  # unix time of each step's end
    images_seen = 0
    begin = time.perf_counter()
    for epoch, batches in enumerate(epochs):
        model.train()
        for images, labels in batches:
            if args.steps is not None and len(losses) == args.steps:
                break
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            times.append(time.time())
            images_seen += len(labels)
        if not args.json:
            print(f"epoch {epoch + 1}: step {len(losses)}, loss {losses[-1]:.4f}", flush=True)
        if args.steps is not None and len(losses) == args.steps:
            break
    seconds = time.perf_counter() - begin
    test_accuracy = accuracy(model, test_loader, device) if test_loader is not None else None

    if args.json:
        result = {
            "losses": losses,
            "times": times,
            "test_accuracy": test_accuracy,
            "images_per_second": images_seen / seconds,
            "seconds": seconds,
            "device": torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__},
            "command": ["python", "-m", "benchmarks.article", *(sys.argv[1:] if argv is None else argv)],
        }
        print(json.dumps(result))
    else:
        shown = "" if test_accuracy is None else f", test accuracy {test_accuracy:.2%}"
        print(f"{len(losses)} steps in {seconds:.1f} s, {images_seen / seconds:.0f} images/s{shown}")


if __name__ == "__main__":
    main()

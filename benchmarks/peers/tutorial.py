"""The tutorial's training loop on the quickstart's job: one process, plain PyTorch, no checkpoints.

    python benchmarks/peers/tutorial.py --images FOLDER --weights FILE --epochs 4

Its loop, optimiser, batch and augmentation are those of benchmarks/article.py (SGD 0.001 with momentum 0.9, batches of 100, crop and flip);
the network and the images are the job's, so that its accuracy can be compared. It resumes as the tutorial does: not at all.
"""

import argparse
import os
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

SEEN = (
    transforms.Resize(96, InterpolationMode.BICUBIC),
    transforms.ToTensor(),
    transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
)
AUGMENT = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomCrop(28, padding=2), *SEEN])


def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    right = seen = 0
    with torch.no_grad():
        for images, labels in loader:
            right += int((model(images).argmax(1) == labels).sum())
            seen += len(labels)
    return right / seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(os.cpu_count() or 1)
    train_set = ImageFolder(args.images / "train", AUGMENT)
    test_set = ImageFolder(args.images / "test", transforms.Compose(SEEN))
    train_loader = DataLoader(train_set, batch_size=100, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=100)
    overlay = {"file": str(args.weights)}
    model = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=len(train_set.classes))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    for epoch in range(args.epochs):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: test accuracy {accuracy(model, test_loader):.4f}", flush=True)


if __name__ == "__main__":
    main()

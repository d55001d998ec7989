"""A plain Ray Train loop on the quickstart's job, with torchvision's transforms, as Ray's guides write it.

    python benchmarks/peers/plain_ray.py --images FOLDER --weights FILE --output FOLDER --epochs 4

docs.ray.io, "Get Started with Distributed Training using PyTorch" and "Saving and Loading Checkpoints": prepare_model,
prepare_data_loader, a checkpoint with each epoch's report, get_checkpoint at the start. The same command again goes on: a run with the same
name and storage path is restored from its last reported checkpoint. The recipe is the quickstart's.
"""

import argparse
import os
import tempfile
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import timm
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
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


def train_func(config):
    torch.manual_seed(config["seed"])
    torch.set_num_threads(os.cpu_count() or 1)
    images = Path(config["images"])
    train_set = ImageFolder(images / "train", AUGMENT)
    test_set = ImageFolder(images / "test", transforms.Compose(SEEN))
    train_loader = ray.train.torch.prepare_data_loader(DataLoader(train_set, batch_size=50, shuffle=True))
    test_loader = ray.train.torch.prepare_data_loader(DataLoader(test_set, batch_size=100))

    classes = len(train_set.class_to_idx)  # `.classes` would have cloudpickle take torch.classes along, which it cannot
    overlay = {"file": config["weights"]}
    model = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
    model = ray.train.torch.prepare_model(model)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = config["epochs"] * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.02, total_steps=steps + 1, pct_start=0.3, anneal_strategy="linear", cycle_momentum=False
    )
    start_epoch = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            saved = torch.load(os.path.join(folder, "checkpoint.pt"))
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            start_epoch = saved["epoch"] + 1

    for epoch in range(start_epoch, config["epochs"]):
        model.train()
        for inputs, labels in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
        model.eval()
        right = seen = 0
        with torch.no_grad():
            for inputs, labels in test_loader:
                right += int((model(inputs).argmax(1) == labels).sum())
                seen += len(labels)
        print(f"epoch {epoch + 1}: test accuracy {right / seen:.4f}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "epoch": epoch}
            torch.save(state, os.path.join(folder, "checkpoint.pt"))
            ray.train.report({"accuracy": right / seen}, checkpoint=Checkpoint.from_directory(folder))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ray.init(address="local", include_dashboard=False)
    trainer = TorchTrainer(
        train_func,
        train_loop_config={"images": str(args.images), "weights": str(args.weights), "epochs": args.epochs, "seed": args.seed},
        scaling_config=ScalingConfig(num_workers=1, use_gpu=False),
        run_config=RunConfig(name="plain", storage_path=str(args.output), failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()

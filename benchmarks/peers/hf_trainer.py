"""Hugging Face's Trainer on the quickstart's job, with a plain torch data set.

    python benchmarks/peers/hf_trainer.py --images FOLDER --weights FILE --output FOLDER --epochs 4

Written as the Trainer's guide and its example run_image_classification.py do it: a model that returns its loss, TrainingArguments with an
evaluation and a checkpoint each epoch, and get_last_checkpoint, so that the same command again goes on. The recipe is the quickstart's, as
far as the Trainer has it; the optimiser is handed over, since its `optim="sgd"` has no momentum.
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

SEEN = (
    transforms.Resize(96, InterpolationMode.BICUBIC),
    transforms.ToTensor(),
    transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
)
AUGMENT = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomCrop(28, padding=2), *SEEN])


class Images(Dataset):
    def __init__(self, folder, transform):
        self.images = ImageFolder(folder, transform)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        pixels, label = self.images[index]
        return {"pixel_values": pixels, "labels": label}


class Classifier(nn.Module):
    def __init__(self, weights, classes):
        super().__init__()
        overlay = {"file": str(weights)}
        self.model = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.05)

    def forward(self, pixel_values, labels=None):
        logits = self.model(pixel_values)
        return {"loss": self.criterion(logits, labels), "logits": logits}


def compute_metrics(predicted):
    return {"accuracy": float(np.mean(np.argmax(predicted.predictions, axis=1) == predicted.label_ids))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train_set = Images(args.images / "train", AUGMENT)
    test_set = Images(args.images / "test", transforms.Compose(SEEN))
    training_args = TrainingArguments(
        output_dir=str(args.output),
        per_device_train_batch_size=50,
        per_device_eval_batch_size=100,
        num_train_epochs=args.epochs,
        learning_rate=0.02,
        lr_scheduler_type="linear",
        warmup_steps=int(0.3 * args.epochs * len(train_set) / 50),
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        seed=args.seed,
    )
    model = Classifier(args.weights, len(train_set.images.classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_set,
        eval_dataset=test_set,
        compute_metrics=compute_metrics,
        optimizers=(optimizer, None),
    )
    last_checkpoint = get_last_checkpoint(args.output) if args.output.is_dir() else None
    trainer.train(resume_from_checkpoint=last_checkpoint)


if __name__ == "__main__":
    main()

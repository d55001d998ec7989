"""Hugging Face's Trainer on the text quickstart's job.

    python benchmarks/peers/hf_trainer_texts.py --texts FOLDER --model FOLDER --output FOLDER --epochs 3

Written as the Trainer's guide and its example run_glue.py do it: AutoModelForSequenceClassification, the tokenizer's own padding, batches
of similar length, an evaluation each epoch, checkpoints by steps, and get_last_checkpoint, so that the same command again goes on. The
recipe is the text quickstart's, as far as the Trainer has it. What is added is a record of the texts of each step, in the form of this
project's ledger.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

LABELS = ("negative", "positive")
SAVE_STEPS = 25


class Texts(Dataset):
    def __init__(self, path, tokenizer, *, is_numbered):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)["input_ids"]
        self.rows = [{"input_ids": ids, "labels": LABELS.index(row["label"])} for ids, row in zip(tokens, rows, strict=True)]
        if is_numbered:
            self.rows = [{**row, "number": number} for number, row in enumerate(self.rows)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])


class RecordingTrainer(Trainer):
    """Writes which texts a step trains on before it does."""

    ledger = None

    def training_step(self, model, inputs, *args, **kwargs):
        if self.ledger is None:
            folder = Path(self.args.output_dir) / "ledger"
            folder.mkdir(parents=True, exist_ok=True)
            attempt = len(list(folder.iterdir())) + 1
            self.ledger = (folder / f"attempt-{attempt:04d}.rank-0000.jsonl").open("w")
            self.record({"attempt": attempt, "rank": 0, "start_step": self.state.global_step})
        ids = inputs.pop("number").tolist()
        self.record({"epoch": int(self.state.epoch + 1e-6), "step": self.state.global_step, "virtual_rank": 0, "ids": ids})
        return super().training_step(model, inputs, *args, **kwargs)

    def record(self, line):
        print(json.dumps(line), file=self.ledger, flush=True)


def compute_metrics(predicted):
    return {"accuracy": float(np.mean(np.argmax(predicted.predictions, axis=1) == predicted.label_ids))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(LABELS))
    training_args = TrainingArguments(
        output_dir=str(args.output),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        num_train_epochs=args.epochs,
        learning_rate=5e-5,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=3,
        logging_strategy="epoch",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        seed=args.seed,
    )
    trainer = RecordingTrainer(
        model=model,
        args=training_args,
        train_dataset=Texts(args.texts / "train.csv", tokenizer, is_numbered=True),
        eval_dataset=Texts(args.texts / "test.csv", tokenizer, is_numbered=False),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    last_checkpoint = get_last_checkpoint(args.output) if args.output.is_dir() else None
    trainer.train(resume_from_checkpoint=last_checkpoint)


if __name__ == "__main__":
    main()

"""A finished run on texts, without the cluster around it: what small_run.py is for images."""

from pathlib import Path

from dataio.config import DataConfig
from dataio.prepared import open_prepared
from tests.texts import make_model, rows, write_csv
from tests.trainer.small_run import train
from trainer.settings.fields import replaced
from trainer.settings.texts import with_text_model
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, TrainConfig

TRAIN, TEST = 240, 60


def train_on_texts(storage: Path, *, steps: int = 60) -> Path:
    """Train a tiny encoder to tell two kinds of sentences apart, of lengths from 4 to 24 tokens: the run's folder."""
    table = [{**row, "split": "train" if number < TRAIN else "test"} for number, row in enumerate(rows(range(TRAIN + TEST)))]
    config = RunConfig(
        run="texts",
        data=DataConfig(path=str(write_csv(storage / "texts.csv", table)), root=str(storage / "data"), batch_size=40, max_tokens=32),
        model=ModelConfig(name=f"hf/{make_model(storage / 'encoder')}"),
        optim=OptimConfig(name="adamw", lr=0.01),
        train=TrainConfig(virtual_ranks=2, precision="fp32", ema=0.5),
    )
    config = with_text_model(config)
    folder, _ = open_prepared(config.data)
    return train(storage, replaced(config, "data.path", str(folder)), steps)

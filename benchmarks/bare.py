"""The same step in a bare loop: our model, loader and optimiser in a plain PyTorch loop without monitoring, checkpoints or checks. With
`pytorchs_optimizer` the optimiser is PyTorch's as well.

    python -m benchmarks.bare --data FOLDER --steps 40                                                    one process
    python -m torch.distributed.run --standalone --nproc-per-node 1 -m benchmarks.bare --data FOLDER      DistributedDataParallel
    python -m benchmarks.bare --data FOLDER --ray                                                         the same as a Ray Train worker

benchmarks/overhead.py and end_to_end.py start it as the peer of `trainer.run`; `Bare` is the peer within one process. The settings of
`trainer.run` decide the step's computation (`-- --train.precision fp32`).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataio.batch import Batch
from dataio.loader import Loader
from dataio.parquet import Dataset, open_dataset
from dataio.quarantine import BadSample
from trainer.drive.capability import decide, here
from trainer.learn.build import build_learner, task_of
from trainer.learn.optim import set_learning_rate
from trainer.models.vision import build_model, has_depthwise
from trainer.rank.worker import make_repeatable
from trainer.settings.spec import make_order, total_steps_of
from trainer.settings.tree import RunConfig


class Bare:
    """One optimisation step as in a tutorial, with the model and the optimiser that `config` selects."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        image_size: tuple[int, int],
        device: torch.device,
        *,
        pytorchs_optimizer: bool = False,
    ) -> None:
        unlike = {"train.precision": (config.train.precision, ("fp32", "bf16")), "train.ema": (config.train.ema, (0.0,))}
        unlike["optim.clip_norm"] = config.optim.clip_norm, (0.0,)
        unlike["data.balance"] = config.data.balance, ("none",)
        unlike["data.class_weights"] = config.data.class_weights, ("",)
        for name, (value, known) in unlike.items():
            if value not in known:
                raise ValueError(f"{name}={value}: the bare loop knows only {' and '.join(map(str, known))}; compare with one of these")
        self._config, self._device = config, device
        learner = build_learner(config, task_of(config, dataset.manifest), image_size, device)
        self._model, self._preprocess, self._optimizer = learner.model, learner.preprocess, learner.optimizer
        if pytorchs_optimizer and device.type == "cpu":  # on a GPU we use PyTorch's already
            theirs = torch.optim.SGD if config.optim.name == "sgd" else torch.optim.AdamW
            self._optimizer = theirs(self._optimizer.param_groups)  # each group holds all hyperparameters
        forward: nn.Module = self._model
        if dist.is_initialized():
            forward = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
        self._forward: Any = torch.compile(forward) if config.train.compile else forward
        self._total = total_steps_of(config, make_order(config, dataset).steps_per_epoch)

    def step(self, batch: Batch, step: int) -> Tensor:
        """Does step `step`; returns its mean loss, () on the device."""
        set_learning_rate(self._optimizer, self._config.optim, step, self._total)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.train.precision == "bf16"):
            logits = self._forward(self._preprocess(batch.samples))  # (n, classes)
        loss = F.cross_entropy(logits.float(), batch.targets["label"], label_smoothing=self._config.optim.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.detach()


def loader_of(config: RunConfig, dataset: Dataset, device: torch.device, *, virtual_ranks: range = range(1)) -> Loader:
    """The run's own loader, for a rank that carries `virtual_ranks`."""
    return Loader(
        dataset,
        config.data,
        order=make_order(config, dataset),
        virtual_ranks=virtual_ranks,
        device=device,
        seed=config.train.seed,
        threads=torch.get_num_threads(),
        on_bad=refuse,
    )


def decided(config: RunConfig) -> RunConfig:
    """`config` with every auto resolved, as `trainer.run` does on this machine."""
    if "auto" not in (config.train.precision, config.train.channels_last):
        return config
    model = build_model(dataclasses.replace(config.model, weights="none", stem="native"), classes=2, seed=0, image_hw=(64, 64))
    decision = decide(config.train, here(use_gpus=torch.cuda.is_available()), has_depthwise=has_depthwise(model))
    return dataclasses.replace(config, train=decision.train)


def refuse(bad: BadSample) -> None:
    raise ValueError(f"{bad.key} is bad ({bad.reason}); measure on a data set that is not")


def measure(data: str, *, steps: int, threads: int, settings: Sequence[str]) -> dict[str, Any]:
    """Does `steps` steps in this process, in its process group if there is one; returns the unix time of each step's end, and the setup."""
    from trainer.settings.cli import parse

    config = decided(parse([*settings, "--data.path", data, "--train.virtual-ranks", "1"]).config)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    make_repeatable(threads)
    dataset = open_dataset(data)
    loader = loader_of(config, dataset, device)
    bare = Bare(config, dataset, loader.image_size, device)
    loader.load("train")
    images, times, loss = 0, [], torch.zeros(())
    with contextlib.closing(loader.train(0, steps)) as batches:
        for step, (batch,) in enumerate(batches):
            loss = bare.step(batch, step)
            images += len(batch.ids)
            if device.type == "cuda" and step in (0, steps - 1):
                torch.cuda.synchronize()  # so that the first and the last time are of finished work, not of queued work
            times.append(time.time())
    return {
        "precision": config.train.precision,
        "times": times,
        "images": images,
        "batch_size": config.data.batch_size,
        "loss": float(loss),
        "processes": dist.get_world_size() if dist.is_initialized() else 0,
    }


def in_torchrun(data: str, **arguments: Any) -> dict[str, Any]:
    if os.environ["WORLD_SIZE"] != "1":
        raise SystemExit(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: the comparison is of one process; use --nproc-per-node 1")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        return measure(data, **arguments)
    finally:
        dist.destroy_process_group()


def in_ray_train(data: str, **arguments: Any) -> dict[str, Any]:
    """Runs as the one worker of a TorchTrainer, in a Ray of its own with Ray's defaults."""
    import ray
    from ray.train import RunConfig as TrainRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="bare-ray-") as folder:
        result = Path(folder) / "result.json"

        def train(_: dict[str, Any]) -> None:
            from benchmarks import bare  # by name: functions of __main__ would be pickled by value

            result.write_text(json.dumps(bare.measure(data, **arguments)))

        project = str(Path(__file__).parents[1])
        paths = os.pathsep.join(filter(None, [project, os.environ.get("PYTHONPATH")]))
        ray.init(
            address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )  # fmt: skip
        try:
            TorchTrainer(
                train,
                train_loop_config={},
                scaling_config=ScalingConfig(num_workers=1, use_gpu=torch.cuda.is_available()),
                run_config=TrainRunConfig(name="bare", storage_path=folder),
            ).fit()
        finally:
            ray.shutdown()
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a converted data set")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads (%(default)s)")
    parser.add_argument("--ray", action="store_true", help="as a worker of plain Ray Train")
    parser.add_argument("settings", nargs="*", help="settings of trainer.run, after --")
    options = parser.parse_args()
    do = in_ray_train if options.ray else in_torchrun if "TORCHELASTIC_RUN_ID" in os.environ else measure
    print(json.dumps(do(options.data, steps=options.steps, threads=options.threads, settings=options.settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

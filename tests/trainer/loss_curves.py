"""Real loss curves, which the guard's test judges: `python -m tests.trainer.loss_curves` trains 36 small networks on Fashion-MNIST for 88
steps (eight epochs of ten whole batches and a last one of a single image) and writes loss_curves.json. Some learn, some are ruined.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.trainer.test_step import make_loader

CURVES = Path(__file__).with_suffix(".json")
STEPS, STEPS_PER_EPOCH = 88, 11
OPTIMIZERS = (("sgd", 0.01), ("sgd", 0.05), ("sgd", 0.1), ("sgd", 0.3), ("adamw", 0.001), ("adamw", 0.01))


def network(has_norms: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(into, out, 3, 2), *([nn.BatchNorm2d(out)] if has_norms else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 36, 10))


def curve(images: torch.Tensor, labels: torch.Tensor, *, has_norms: bool, batch_size: int, name: str, lr: float) -> list[float]:
    torch.manual_seed(0)
    model = network(has_norms)
    sgd = name == "sgd"
    parameters = model.parameters()
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True) if sgd else torch.optim.AdamW(parameters, lr)
    losses = []
    for step in range(STEPS):
        epoch, number = divmod(step, STEPS_PER_EPOCH)
        order = np.random.default_rng(epoch).permutation(10 * batch_size + 1)
        ids = torch.from_numpy(order[number * batch_size : (number + 1) * batch_size])
        for module in model:
            module.train(len(ids) > 1)  # as trainer.learn.gradients does
        loss = F.cross_entropy(model(images[ids]), labels[ids])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(f"{loss.detach():.4g}"))
    return losses


def main() -> None:
    torch.set_num_threads(1)
    (batch,) = make_loader(1, 100)[0].evaluate("train", range(2000), 2000)
    images = batch.samples.float().mean(1, keepdim=True) / 127.5 - 1  # (n, 1, 28, 28)
    found: list[dict[str, Any]] = []
    for has_norms in (False, True):
        for batch_size in (4, 8, 32):
            for name, lr in OPTIMIZERS:
                case: dict[str, Any] = {"has_norms": has_norms, "batch_size": batch_size, "name": name, "lr": lr}
                found.append({**case, "losses": curve(images, batch.targets["label"], **case)})
    CURVES.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")


if __name__ == "__main__":
    main()

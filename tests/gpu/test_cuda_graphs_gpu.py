"""On a GPU: a step replayed as CUDA graphs gives the bits of the step whose kernels are launched one by one."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dataio.batch import Batch
from dataio.config import DataConfig
from dataio.schema import LABEL, Target
from trainer.learn.build import Learner
from trainer.learn.optim import build_optimizer
from trainer.models.vision import Preprocess
from trainer.settings.tree import OptimConfig, RunConfig, TrainConfig
from trainer.tasks.make import make_task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False here"),
]

BATCH = 32


class Net(nn.Module):
    """Convolutions, BatchNorm, dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.2))
        self.fc = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def batches(step: int, virtual_ranks: int, count: int) -> Sequence[Batch]:
    generator = torch.Generator().manual_seed(step)
    made = []
    for virtual_rank in range(virtual_ranks):
        images = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
        labels = torch.randint(0, 10, (count,), generator=generator)
        ids = np.arange(count, dtype=np.int64)
        made.append(Batch(samples=images.cuda(), targets={"label": labels.cuda()}, ids=ids, epoch=0, step=step, virtual_rank=virtual_rank))
    return made


def trained(*, cuda_graphs: bool, virtual_ranks: int, compiles: bool = True) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    model = Net().cuda().to(memory_format=torch.channels_last)
    config = RunConfig(
        data=DataConfig(batch_size=BATCH * virtual_ranks),
        train=TrainConfig(
            seed=3, precision="bf16", compile=compiles, cuda_graphs="on" if cuda_graphs else "off", virtual_ranks=virtual_ranks
        ),
    )
    stepper = Learner(
        config=config,
        task=make_task(config.task, (Target(name=LABEL, kind="label", classes=tuple(map(str, range(10)))),)),
        model=model,
        preprocess=Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, channels_last=True).cuda(),
        optimizer=build_optimizer(model, OptimConfig(lr=0.05), "fc"),
        head_name="fc",
        device=torch.device("cuda", torch.cuda.current_device()),
    ).stepper()
    stepper.compile_ahead((3, 16, 16))
    losses = []
    for step in range(12):
        count = BATCH if step != 7 else 5  # the short end of an epoch, which is not compiled
        losses.append(stepper.step(batches(step, virtual_ranks, count), global_count=count * virtual_ranks, step=step))
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("virtual_ranks", [1, 2])
def test_a_replayed_step_gives_the_same_bits_and_its_losses_stay_what_they_were(virtual_ranks: int) -> None:
    losses, weights = trained(cuda_graphs=False, virtual_ranks=virtual_ranks)
    torch._dynamo.reset()
    counters.clear()
    again, replayed = trained(cuda_graphs=True, virtual_ranks=virtual_ranks)
    assert counters["inductor"]["cudagraph_skips"] == 0  # else the kernels would have been launched one by one here too
    assert [float(loss) for loss in again] == [float(loss) for loss in losses]
    assert all(torch.equal(value, replayed[name]) for name, value in weights.items())
    assert int(replayed["body.1.num_batches_tracked"]) == 12  # a replay adds nothing; it is added up after it


@pytest.mark.parametrize("virtual_ranks", [1, 2])
def test_a_step_that_is_not_compiled_gives_the_same_bits_as_well(virtual_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    replay, replays = torch.cuda.CUDAGraph.replay, []

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    losses, weights = trained(cuda_graphs=False, virtual_ranks=virtual_ranks, compiles=False)
    assert not replays
    again, replayed = trained(cuda_graphs=True, virtual_ranks=virtual_ranks, compiles=False)
    assert len(replays) == 11 * virtual_ranks  # one batch is short
    assert len(set(replays)) == 1
    assert [float(loss) for loss in again] == [float(loss) for loss in losses]
    assert all(torch.equal(value, replayed[name]) for name, value in weights.items())
    assert int(replayed["body.1.num_batches_tracked"]) == 12


def test_a_model_that_waits_for_the_gpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda net, images: forward(net, images) * (2.0 if float(images.mean()) > 1e9 else 1.0))
    with pytest.raises(ValueError, match=r"train.cuda_graphs=on cannot record this step: .* use --train.no-cuda-graphs"):
        trained(cuda_graphs=True, virtual_ranks=1, compiles=False)

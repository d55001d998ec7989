"""On a GPU: a snapshot has the bytes that it has on a CPU, and is taken with a few kernels, whatever the number of tensors."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from trainer.learn.state import MODEL_FILE, OPTIMIZER_FILE, TrainState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False here"),
]


def state_of(model: nn.Module) -> TrainState:
    """With the momentum of a step: of each parameter, as it lies in memory."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return TrainState(model, optimizer)


def joined(state: TrainState) -> dict[str, bytes]:
    snapshot = state.snapshot()
    files = {name: b"".join(buffers) for name, buffers in snapshot.files().items()}
    snapshot.release()
    return files


def test_a_snapshot_of_a_gpu_has_the_bytes_of_a_cpus_and_many_tensors_are_copied_by_one_kernel() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)  # with convolutions of one pixel
    on_gpu = state_of(copy.deepcopy(model).cuda())
    on_cpu = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    files = joined(on_gpu)
    on_cpu.load(files.__getitem__)
    wanted = joined(on_cpu)
    assert files.keys() == wanted.keys() == {MODEL_FILE, OPTIMIZER_FILE}
    assert files == wanted
    tensors = len(model.state_dict()) + len(list(model.parameters()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        on_gpu.snapshot()
    calls = {average.key: average.count for average in profile.key_averages()}
    assert calls["aten::_foreach_copy_"] == 3  # weights, counters; momentum
    assert calls["aten::copy_"] < 20 < tensors  # headers, and the way to the host

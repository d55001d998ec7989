"""How many operations a step is made of. On a GPU each is a kernel or more, and the host must queue all of them in less time than the
device works: what adds one to every layer is noticed here, where nobody has a GPU.

Counted on a CPU, with the optimiser that a GPU has."""

from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.test_step import batches_of, make

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts a step's operations by the part that they belong to, all but views and allocations. As a StepObserver it learns where parts
    end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: dict[str, Counter[str]] = {}
        self._open: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if not func.is_view and name not in ALLOCATIONS and not name.startswith("_record_function"):
            self._open[name] += 1
        return func(*args, **(kwargs or {}))

    def phase(self, phase: str, /) -> None: ...

    def part(self, part: str, /) -> None:
        self.parts[part] = self.parts.get(part, Counter()) + self._open
        self._open = Counter()

    def takes_norm(self) -> bool:
        return False


def launches_of(**how: Any) -> dict[str, Counter[str]]:
    """Of the second step of ResNet-18 in bf16: the first one also makes the optimiser's state."""
    model = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    seen = Launches()
    shape = (how.get("virtual_ranks", 1), 8)
    stepper = make(model, optimizer, precision="bf16", observer=seen, **how)
    for step, batches in enumerate(batches_of(shape, 0, 2)):
        seen.parts.clear()
        with seen:
            stepper.step(batches, global_count=8, step=step)
    return seen.parts


PLAIN = {"forward": 105, "backward": 102, "optimizer": 75}
"""Found: 100, 97, 68, of which 62 are the sums of gradients that a GPU does with one operation. The room is for other versions of PyTorch,
and less than one operation for each of the 20 convolutions or norms."""
TREE = {"forward": 2 * 107, "backward": 2 * 106, "reduction": 3, "optimizer": 12}
"""Of two virtual ranks. Found: 204, 202, 1, 6."""


@pytest.mark.parametrize(("how", "most"), [({}, PLAIN), ({"virtual_ranks": 2}, TREE)], ids=["plain", "tree"])
def test_a_step_of_resnet18_is_made_of_no_more_operations_than_this(how: dict[str, Any], most: dict[str, int]) -> None:
    found = launches_of(**how)
    assert found.keys() == most.keys()
    for part, counted in found.items():
        assert 0 < counted.total() <= most[part], (part, counted.most_common())
    passes = how.get("virtual_ranks", 1)
    assert found["forward"]["native_batch_norm"] == 20 * passes  # it has counted at all
    assert found["forward"]["add_"] == 8 * passes  # the blocks' own, and no norm's counter


def test_a_weight_is_cast_once_a_step_however_many_passes_read_it() -> None:
    """22 of them: 20 convolutions, the last layer and its bias. The others are casts of images and losses, once a pass."""
    casts = {virtual_ranks: launches_of(virtual_ranks=virtual_ranks)["forward"]["_to_copy"] for virtual_ranks in (2, 4)}
    a_pass = (casts[4] - casts[2]) // 2
    assert casts[2] - 2 * a_pass == 22, casts
    assert a_pass < 6, casts

"""Several real processes in which one evaluation is combined, for the tests of tasks."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dataio.batch import Targets
from trainer.tasks.task import Evaluation, Result

WORLD = 3


def over_ranks(evaluations: Callable[[], Sequence[Evaluation]], outputs: Tensor, targets: Targets, folder: Path) -> list[list[Result]]:
    """What each of three ranks says after each was given its part, the middle one nothing. `evaluations` is at a module's top level."""
    mp.spawn(_rank_main, (str(folder), evaluations, outputs, dict(targets)), nprocs=WORLD)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]


def _rank_main(rank: int, folder: str, evaluations: Callable[[], Sequence[Evaluation]], outputs: Tensor, targets: Targets) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    cut = len(outputs) // 3
    share = (slice(0, cut), slice(0, 0), slice(cut, None))[rank]
    results = []
    for evaluation in evaluations():
        if rank != 1:
            evaluation.update(outputs[share], {name: values[share] for name, values in targets.items()})
        evaluation.combine(rank, WORLD)
        results.append(evaluation.result())
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()

"""LoRA (Hu et al. 2021): a model of texts whose own weights rest, while small matrices beside attention's projections and the head are
trained. trainer.models.text adds the adapters, trainer.learn.optim asks what they leave to train, and trainer.rank.finishing merges them
into the weights that are exported, so that nobody who uses the model needs to know of them.

The adapters are the library PEFT's. It keeps a layer W under `NAME.base_layer` and computes W x + (alpha / rank) B A x beside it, where B
begins at zero: before the first step the model answers as it would without.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.models.random_state import random_state
from trainer.settings.texts import TYPES
from trainer.settings.tree import ModelConfig

_ADAPTER = "default"
_BASE, _A, _B = ".base_layer.", f".lora_A.{_ADAPTER}.", f".lora_B.{_ADAPTER}."


def add_adapters(encoder: nn.Module, kind: str, config: ModelConfig, *, seed: int) -> None:
    """Put adapters beside the projections of an encoder of the type `kind`, in place. What they draw depends on `seed` alone. ValueError if
    the layers that they belong to are not there."""
    from peft import LoraConfig, inject_adapter_in_model  # here: it takes a while, and most runs have no adapters
    from transformers.pytorch_utils import Conv1D

    adapts = TYPES[kind].adapts
    layers = [layer for name, layer in encoder.named_modules() if name.rpartition(".")[2] in adapts]
    if not layers:
        raise ValueError(
            f"model.lora_rank={config.lora_rank}: the model has no layer called {' or '.join(adapts)}; use --model.lora-rank 0"
        )
    wanted = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=list(adapts),
        fan_in_fan_out=isinstance(layers[0], Conv1D),
    )
    with random_state(seed):
        inject_adapter_in_model(wanted, encoder, adapter_name=_ADAPTER)


def resting(model: nn.Module) -> frozenset[str]:
    """The names of the parameters that are never trained: all of the part that has adapters but for these. None of a model without."""
    names = [name for name, _ in model.named_parameters()]
    parts = {name.partition(".")[0] for name in names if _is_adapter(name)}
    return frozenset(name for name in names if name.partition(".")[0] in parts and not _is_adapter(name))


def merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`tensors`, a state_dict of `model` (its own, or an average), with the adapters merged into the weights beside them: a state_dict of
    the model without adapters. `tensors` itself if it has none. The sums are made on the CPU."""
    if not resting(model):
        return tensors
    from peft.tuners.lora import Linear

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    found = {name.replace(_BASE, "."): tensor for name, tensor in tensors.items() if not _is_adapter(name)}
    for name, layer in layers.items():
        base, a, b = (tensors[f"{name}{part}weight"].detach().cpu() for part in (_BASE, _A, _B))  # (out, in), (rank, in), (out, rank)
        change = (b @ a) * layer.scaling[_ADAPTER]
        found[f"{name}.weight"] = torch.add(base, change.T if layer.fan_in_fan_out else change)
    return found


def _is_adapter(name: str) -> bool:
    return _A in name or _B in name

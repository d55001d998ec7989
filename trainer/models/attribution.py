"""Which tokens of a text a model's answer comes from: what cam.py is for images. Called by trainer.rank.explain_texts; the caller says what
is explained (trainer.tasks.explained).

It is gradient x input (Shrikumar et al. 2016, section 3.1) at the embeddings of words, with what normalises held fixed: the scale of each
norm, and the weights of attention (Ali et al. 2022, the rules LN and AH). What is left is linear in the words up to the activations,
so that the parts of the tokens add up to the score but for biases and positions. The plain product does not tell words apart: a norm gives
the same for twice its input, so the gradient along an embedding is near 0 whatever the word means. Of MiniLM with a linear head, on 150 of
the film snippets, the answer's probability fell by 0.57 without the fifth of the tokens that is named here, by 0.03 without that which the
plain product names, and by 0.05 to 0.08 without one drawn at random (tests/trainer/test_text_explain.py asks the same of fewer).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

METHOD = "gradient x input"

Score = Callable[[Tensor], Tensor]
"""(n, outputs) -> (n,): what is to be explained, the higher the surer."""


class NoEmbeddingsError(ValueError):
    """The model is no encoder with embeddings of words, so its answers cannot be explained by tokens."""

    failure_kind = "user"


@torch.inference_mode(False)
def token_strengths(model: nn.Module, tokens: Tensor, score: Score) -> Tensor:
    """(n, T) float32 for tokens (n, T) as the model takes them: above 0 what speaks for the answer, below 0 what speaks against it, in
    units of the score. `model` in eval mode. A text's strengths do not depend on the others but for the last bits. NoEmbeddingsError if
    nothing in the model turns tokens into vectors."""
    assert not model.training, "dropout would draw tokens at random"
    find = getattr(getattr(model, "encoder", None), "get_input_embeddings", None)
    if find is None:
        raise NoEmbeddingsError(f"{type(model).__name__} is no encoder with embeddings of words, so there is nothing to show")
    words: list[Tensor] = []

    def begin_here(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        words.append(output.detach().requires_grad_())  # the parameters before it may be frozen
        return words[-1]

    handle = find().register_forward_hook(begin_here)
    try:
        with torch.enable_grad():
            with _Held():
                outputs = model(tokens.clone())
            total = score(outputs).sum()
    finally:
        handle.remove()
    (slopes,) = torch.autograd.grad(total, words)  # (n, T, width)
    return (slopes.float() * words[0].detach().float()).sum(2)


_HELD = (F.softmax, torch.softmax, Tensor.softmax, torch.rsqrt)
"""The weights of attention, and the scale by which decoders normalise."""


class _Held(TorchFunctionMode):
    """What normalises has no gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if func is F.layer_norm:
            return _scaled(*args, **given)
        found = func(*args, **given)
        return found.detach() if func in _HELD else found


def _scaled(
    given: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """F.layer_norm, whose scale is a constant of the gradient."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = given - given.mean(axes, keepdim=True)
    scaled = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt().detach()
    if weight is not None:
        scaled = scaled * weight
    return scaled if bias is None else scaled + bias

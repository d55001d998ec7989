"""Models of texts: an encoder or a decoder as transformers saves one, and a new head. trainer.tasks.text builds its networks here.

The architecture is that of config.json in the model's folder (trainer.settings.texts), built by the library's own classes; code that a
folder brings along is never run, and weights are read from safetensors alone. The network takes tokens as dataio stores them, so that
whatever holds one, a run or a prediction, needs nothing but rows of tokens.

Attention is the plain product of matrices (`eager`): the library's faster ones add up in an order that may differ from run to run on a GPU.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dataio.codecs.text.tokens import MOST_TOKENS_KNOWN, PART_BIT
from trainer.models.adapters import add_adapters
from trainer.models.architecture import one_line
from trainer.models.random_state import derived_seed, random_state
from trainer.models.weights import LOG, WeightsError, load_into, read_state, with_fitting_head, without_prefix
from trainer.settings.texts import PACKAGES, PREFIX, TYPES, WEIGHTS_FILE, description_of, model_place, pooling_of
from trainer.settings.tree import ModelConfig
from trainer.settings.weight_files import files_of

HEAD = "head"
ENCODER = "encoder"
_NOT_OF_IT = (
    *("pooler.", "cls.", "lm_head.", "embed_out.", "score.", "classifier.", "qa_outputs."),
    *("vocab_projector.", "vocab_transform.", "vocab_layer_norm."),
)
"""What files of weights hold beside an encoder: heads for what it was trained for, which are left out without a word."""
_COMPUTED = ("position_ids", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
"""How the names of tensors end that older releases saved and newer ones compute."""
_DROPOUTS = ("classifier_dropout", "hidden_dropout_prob", "seq_classif_dropout", "dropout")
"""Where configs say how much of the head's input is dropped, the most special first."""


class TextModel(nn.Module):
    """An encoder (or a decoder, under the same name), the mean of its tokens or one of them, and a linear head: (n, T) int64 of stored
    tokens -> (n, outputs). Texts are padded on the right, so a decoder's tokens see no padding."""

    blocks = r"encoder\.(?:encoder\.layer|encoder\.albert_layer_groups|transformer\.layer|layers|h)\.\d+"
    """A block's name, which its parameters' names begin with (trainer.learn.depth)."""

    def __init__(
        self, encoder: nn.Module, *, outputs: int, pooling: str, width: int, dropout: float, pad: int, known: int, has_parts: bool
    ) -> None:
        """`width`: of a token in the encoder. `pad`: the token that stands behind a text; attention does not see it. `known`: how many
        tokens it has embeddings of; special ones that a tokenizer has beyond them are read as `pad`. `has_parts`: it is told which of a
        pair of texts a token is of."""
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, outputs)
        self.pad, self.known, self._pooling, self._has_parts = pad, known, pooling, has_parts

    def forward(self, tokens: Tensor) -> Tensor:
        return self.answer(**self.inputs_of(tokens))

    def inputs_of(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the encoder takes, by the names that transformers has for it: each (n, T) int64."""
        is_text = tokens >= 0  # (n, T)
        ids = tokens & (MOST_TOKENS_KNOWN - 1)  # what is behind a text is then the largest, and no token
        inputs = {"input_ids": self.known_ids(ids), "attention_mask": is_text.long()}
        if self._has_parts:
            inputs["token_type_ids"] = torch.where(is_text, tokens >> PART_BIT, 0)
        return inputs

    def known_ids(self, ids: Tensor) -> Tensor:
        """Tokens without an embedding as `pad`."""
        return torch.where(ids < self.known, ids, self.pad)

    def answer(self, **inputs: Tensor) -> Tensor:
        """(n, outputs) of what `inputs_of` gives."""
        hidden = self.encoder(**inputs).last_hidden_state  # (n, T, width)
        if self._pooling == "first":
            pooled = hidden[:, 0]
        elif self._pooling == "last":
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), inputs["attention_mask"].sum(1) - 1]  # every row has a token
        else:
            weights = inputs["attention_mask"].to(hidden.dtype)[:, :, None]  # (n, T, 1)
            pooled = (hidden * weights).sum(1) / weights.sum(1)  # every row has a token
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


class Tokens(nn.Module):
    """Rows of tokens from the loader, (n, T) int32, as the model takes them: int64. What Preprocess is for images."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.long()


def build_text_model(config: ModelConfig, *, outputs: int, seed: int, names: Sequence[str] | None = None) -> TextModel:
    """Build the model on the CPU in float32, in train mode. `names` of the outputs, if known, decide whether a file's head is kept. The
    result depends only on the arguments. ValueError (WeightsError for weights) if the configuration cannot be met."""
    if outputs < 1:
        raise ValueError(f"{outputs} outputs: a model says at least one number of a text")
    place = model_place(config.name)
    description = description_of(place)
    model = _architecture(config, description, outputs=outputs, seed=seed)
    if config.weights != "none":
        state = _fitted(model, _read(config, place), config.weights, outputs=outputs, names=names)
        load_into(model, state, may_differ=[f"{HEAD}.weight", f"{HEAD}.bias"], source=config.weights)
    if config.lora_rank:
        add_adapters(model.encoder, description["model_type"], config, seed=derived_seed(seed, "adapters"))
    _check_forward(model, config, outputs)
    return model.train()


def _architecture(config: ModelConfig, description: Mapping[str, Any], *, outputs: int, seed: int) -> TextModel:
    values = {key: value for key, value in description.items() if key not in ("model_type", "auto_map", "dtype", "torch_dtype")}
    kind = description["model_type"]
    quiet = logging.getLogger("transformers")
    before = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns of defaults
    try:
        with random_state(derived_seed(seed, "architecture")):
            own = transformers.AutoConfig.for_model(kind, **values)
            if TYPES[kind].is_decoder:
                own.use_cache = False  # of keys and values, for the next token: nobody asks for one
            encoder = transformers.AutoModel.from_config(own, attn_implementation="eager").float()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # it would be of the first token alone, and no gradient would reach it
        with random_state(derived_seed(seed, "head")):
            return TextModel(
                encoder,
                outputs=outputs,
                pooling=pooling_of(config, description),
                width=int(own.hidden_size),
                dropout=next((float(rate) for name in _DROPOUTS if (rate := getattr(own, name, None)) is not None), 0.0),
                pad=_padding(own),
                known=int(own.vocab_size),
                has_parts=int(getattr(own, "type_vocab_size", 0) or 0) > 1 and hasattr(encoder.embeddings, "token_type_embeddings"),
            )
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(f"model.name={config.name} cannot be built from its config.json: {one_line(error)}") from error
    finally:
        quiet.setLevel(before)


def _padding(own: Any) -> int:
    """A token to stand behind a text, whichever has an embedding: many decoders have none for it, or one that is not in their own."""
    token = own.pad_token_id
    return token if isinstance(token, int) and 0 <= token < own.vocab_size else 0


def _read(config: ModelConfig, place: Path) -> dict[str, Tensor]:
    """The weights of the file, or of those that an index names, as they are. A package's is compared with the hash that is known."""
    path = Path(config.weights).expanduser()
    package = PACKAGES.get(config.name.removeprefix(PREFIX))
    if package is not None and path.resolve() == (place / WEIGHTS_FILE).resolve():
        for name, sha256 in package.sha256.items():
            file = place / name
            if not file.is_file() or _sha256(file) != sha256:
                raise WeightsError(f"{file} is missing or not the known one (sha256 {sha256}); reinstall the package {package.needs}")
    if not path.is_file():
        raise WeightsError(f"model.weights={config.weights}: no such file; weights of texts are none, or a file of safetensors")
    try:
        files = files_of(path)
    except ValueError as error:
        raise WeightsError(f"model.weights={config.weights}: {error}") from None
    if any(file.suffix != ".safetensors" for file in files):
        raise WeightsError(f"model.weights={config.weights}: weights of texts are read from .safetensors alone; save the model into one")
    return {name: tensor for file in files for name, tensor in read_state(file, source=str(file)).items()}


def _fitted(model: TextModel, state: dict[str, Tensor], source: str, *, outputs: int, names: Sequence[str] | None) -> dict[str, Tensor]:
    """`state` under the model's own names: from a run's exported model, or from an encoder as its library saves it."""
    inner = list(model.encoder.state_dict())
    if all(f"{ENCODER}.{name}" in state for name in inner):
        return with_fitting_head(state, HEAD, outputs=outputs, names=names, source=source)
    # Files from before 2019 call a norm's numbers gamma and beta.
    state = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): each
        for name, each in state.items()
    }
    state = without_prefix(state, inner, source=source)
    known = set(inner)
    others = [name for name in state if name not in known and not name.startswith(_NOT_OF_IT) and not name.endswith(_COMPUTED)]
    if others:
        LOG.info("model.weights=%s: left out, as not of the encoder: %s", source, ", ".join(others[:8]))
    return {f"{ENCODER}.{name}": state[name] for name in inner if name in state}


def _check_forward(model: TextModel, config: ModelConfig, outputs: int) -> None:
    """Run one short text through the model, so that what does not fit fails here with a clear message, before the first step."""
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.tensor([[0, 1, -1]]))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"model.name={config.name} does not take a text ({one_line(error)})") from error
    if logits.shape != (1, outputs) or not bool(logits.isfinite().all()):
        raise ValueError(f"model.name={config.name} answers {logits.tolist()} for one text, not {outputs} finite numbers")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

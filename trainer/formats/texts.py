"""The graph of a model of texts, and the files beside it by which other programs make its inputs. trainer.formats.graph calls it.

Inputs and output have the names that transformers and optimum know: `input_ids`, `attention_mask`, for some encoders `token_type_ids`, and
`logits`. Beside the graph lie the tokenizer, which cuts and pads as the model was trained, and the two files that transformers looks for.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dataio.codecs.text.form import TOKENIZER_FILE
from dataio.codecs.text.tokens import PAD
from dataio.texts import padded
from trainer.export.model_folder import Exported, TextExport, output_names
from trainer.formats.made import BATCH, MOST_IN_A_BATCH, ONNX_FILE, PROGRAM_FILE, Axis, Graph
from trainer.models.text import TextModel

LENGTH, LOGITS = "sequence", "logits"
CONFIG_FILE, TOKENIZER_CONFIG_FILE = "config.json", "tokenizer_config.json"
_KINDS = {"label": "single_label_classification", "labels": "multi_label_classification", "number": "regression"}
_FROM_TOKENIZER = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class _Answers(nn.Module):
    """The network by its inputs' usual names, each (n, T) int64 -> (n, outputs)."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.answer(input_ids=self.model.known_ids(input_ids), attention_mask=attention_mask)


class _AnswersPairs(_Answers):
    """The same of an encoder that is told which of a pair of texts a token is of."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:  # type: ignore[override]
        known = self.model.known_ids(input_ids)
        return self.model.answer(input_ids=known, attention_mask=attention_mask, token_type_ids=token_type_ids)


def graph_of_texts(exported: Exported, texts: TextExport) -> Graph:
    """ValueError if the model is a network of the user's own, whose inputs nobody knows."""
    model = exported.model
    if not isinstance(model, TextModel):
        raise ValueError(f"the network is {type(model).__name__}, one of your own; only an encoder with its head can be exported")

    def given(samples: Tensor) -> Mapping[str, Tensor]:
        return model.inputs_of(exported.preprocess(samples))

    rows = torch.zeros(2, 7, dtype=torch.int32)  # (n, T); neither number means anything to the network
    rows[1, 5:] = PAD
    example = given(rows)
    tokenizer, pad, pad_token = _tokenizer(texts, model.pad)
    return Graph(
        network=(_AnswersPairs if "token_type_ids" in example else _Answers)(model).eval(),
        example=example,
        free={0: Axis(name=BATCH, most=MOST_IN_A_BATCH), 1: Axis(name=LENGTH, most=padded(texts.max_tokens))},
        output=LOGITS,
        given=given,
        takes={
            "names": list(example),
            "shape": [BATCH, LENGTH],
            "type": "int64",
            "prepared": "by the caller",
            "tokenizer": TOKENIZER_FILE,
            "max_tokens": texts.max_tokens,
            "too_long": texts.too_long,
            "pad_token_id": pad,
        },
        code={"onnx": tuple(_onnx_code(list(example))), "torch": tuple(_program_code(list(example)))},
        files={
            TOKENIZER_FILE: tokenizer,
            TOKENIZER_CONFIG_FILE: _json(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "model_max_length": texts.max_tokens,
                    "model_input_names": list(example),
                    "pad_token": pad_token,
                    "padding_side": "right",
                }
            ),
            CONFIG_FILE: _json(_config(exported, texts)),
        },
    )


def _tokenizer(texts: TextExport, pad: int) -> tuple[bytes, int, str]:
    """The model's tokenizer, set to cut a text as the model was trained and to pad a batch, and the token that it pads with."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(texts.tokenizer.decode())
    if tokenizer.id_to_token(pad) is None:  # the configuration is not of this tokenizer; attention does not see it, so any will do
        pad = 0
    token = str(tokenizer.id_to_token(pad))
    tokenizer.enable_truncation(texts.max_tokens)
    tokenizer.enable_padding(pad_id=pad, pad_token=token)
    return tokenizer.to_str().encode(), pad, token


def _config(exported: Exported, texts: TextExport) -> dict[str, Any]:
    """The encoder's configuration, with what transformers says of a classifier's outputs."""
    names, targets = output_names(exported.task), exported.task.targets
    config = {key: each for key, each in texts.architecture.items() if key not in ("auto_map", "architectures", "id2label", "label2id")}
    if len(targets) == 1:
        config["problem_type"] = _KINDS[targets[0].kind]
    if names is not None:
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return config


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _onnx_code(names: list[str]) -> Iterator[str]:
    yield from ("import numpy, onnxruntime, tokenizers", "", f'tokenizer = tokenizers.Tokenizer.from_file("{TOKENIZER_FILE}")')
    yield f'session = onnxruntime.InferenceSession("{ONNX_FILE}")'
    yield "encoded = tokenizer.encode_batch(texts)  # texts: a list of strings, or of pairs of strings"
    yield "inputs = {"
    yield from (f'    "{name}": numpy.array([each.{_FROM_TOKENIZER[name]} for each in encoded], numpy.int64),' for name in names)
    yield from ("}", "(outputs,) = session.run(None, inputs)")


def _program_code(names: list[str]) -> Iterator[str]:
    yield from ("import tokenizers, torch", "", f'tokenizer = tokenizers.Tokenizer.from_file("{TOKENIZER_FILE}")')
    yield f'model = torch.export.load("{PROGRAM_FILE}").module()'
    yield "encoded = tokenizer.encode_batch(texts)  # texts: a list of strings, or of pairs of strings"
    inputs = (f"torch.tensor([each.{_FROM_TOKENIZER[name]} for each in encoded])" for name in names)
    yield from ("with torch.inference_mode():", "    outputs = model(", *(f"        {each}," for each in inputs), "    )")

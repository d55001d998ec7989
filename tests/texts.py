"""Texts for tests: a tokenizer and a tiny model, made here with random weights, and sentences that say what they are."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

_NEUTRAL = ("the", "a", "film", "book", "meal", "was", "is", "not", "very", "and", "but", "i", "we", "it", "this", "that", "again", "never")
GOOD, BAD = ("good", "fine", "great", "warm", "liked"), ("bad", "dull", "poor", "cold", "hated")
WORDS = (*_NEUTRAL, *GOOD, *BAD)


def make_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """Write tokenizer.json, which knows these words, into `folder`. Skips the test where the extra is not installed."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    made = tokenizers.Tokenizer(WordLevel({word: number for number, word in enumerate((*special, *words))}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = Lowercase(), Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As many published ones: padded and cut as the model's authors liked it, which must not matter.
    made.enable_padding(length=20)
    made.enable_truncation(6)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}
_TINY_OTHERWISE = {
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
}


def tiny_description(kind: str, **changes: Any) -> dict[str, Any]:
    """The content of a tiny model's config.json, of the type `kind`, as the hub's models have it: a decoder has no padding token."""
    from trainer.settings.texts import TYPES

    sizes: dict[str, Any] = {"model_type": kind, "vocab_size": 4 + len(WORDS), **_TINY_OTHERWISE.get(kind, TINY)}
    if TYPES[kind].is_decoder:
        sizes |= {} if kind in ("gpt2", "gpt_neox") else {"num_key_value_heads": 1, "head_dim": 8}
        sizes |= {"pad_token_id": None, "eos_token_id": 3}
    else:
        sizes |= {"pad_token_id": 1 if TYPES[kind].idle_positions else 0} | (
            {"embedding_size": 16} if kind in ("albert", "electra") else {}
        )
    return {**sizes, **changes}


def make_model(folder: Path, words: Sequence[str] = WORDS, **changes: Any) -> Path:
    """Write a tiny BERT with random weights, as its library saves one, and a tokenizer that knows `words` into `folder`."""
    make_tokenizer(folder, words)
    transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(**{"vocab_size": 4 + len(words), **TINY, **changes}))
    model.save_pretrained(folder)
    return folder


def make_decoder(folder: Path, kind: str = "llama", *, head: bool = True, shard_bytes: int | None = None, **changes: Any) -> Path:
    """Write a tiny decoder with random weights, as its library saves one (with the head that says the next token), and its tokenizer into
    `folder`. `shard_bytes`: in files of this size at most."""
    make_tokenizer(folder)
    transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
    import torch

    described = tiny_description(kind, **changes)
    config = transformers.AutoConfig.for_model(described.pop("model_type"), **described)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (transformers.AutoModelForCausalLM if head else transformers.AutoModel).from_config(config)
    model.save_pretrained(folder, **({"max_shard_size": shard_bytes} if shard_bytes is not None else {}))
    return folder


def sentence(number: int) -> tuple[str, str]:
    """The text of this number and what it says: pos or neg. Of 2 to 22 words, no two of the first some thousand alike."""
    is_good = number % 2 == 0
    drawn = [(number * 7919 + place * 104729 + number * place * 31) % 1009 for place in range(2 + number % 21)]
    words = [_NEUTRAL[each % len(_NEUTRAL)] for each in drawn]
    words[drawn[0] % len(words)] = (GOOD if is_good else BAD)[drawn[1] % 5]
    return " ".join(words), "pos" if is_good else "neg"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
    return path


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(numbers: range) -> list[dict[str, str]]:
    """Rows of a table of sentences."""
    return [{"text": text, "label": label} for text, label in map(sentence, numbers)]

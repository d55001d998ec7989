"""deploy/serve of a model of texts, without Ray: answers are those of `finetune predict`, by the export alone."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.small_text_run import train_on_texts
from trainer.formats.__main__ import main
from trainer.inference.texts import TextPredictor
from trainer.runs.model_files import find_model

pytest.importorskip("transformers", reason="the extra `text` is not installed")
pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("onnxruntime.quantization", reason="the extra serve is not installed")

from deploy.serve.exports import open_export
from deploy.serve.front import status_of
from deploy.serve.predictor import Predictor
from deploy.serve.questions import Answer, Question
from deploy.serve.settings import ServeConfig
from tests.deploy.test_serve import Client, changed

pytestmark = pytest.mark.usefixtures("threads_kept")

TEXTS = ("the film was very good", "dull", "we hated  it\nand the MEAL was cold", "the book was fine and " * 10, " ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_texts(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports")
    assert main([str(run), "--out", str(out)]) == 0
    return out / "onnx"


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


def served(folder: Path) -> Predictor:
    return Predictor(open_export(str(folder)), ServeConfig(export=str(folder)))


def asked(predictor: Predictor, *bodies: bytes, is_json: bool = False) -> list[Answer]:
    return predictor.answers([Question(body=body, top=2, is_json=is_json) for body in bodies])


def test_answers_are_those_of_predict(run: Path, exported: Path, tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    own = list(TextPredictor(find_model(str(run)), device=torch.device("cpu")).predict([str(tmp_path)], text_column="", top=2))
    answers = asked(served(exported), *(text.encode() for text in TEXTS))
    for answer, wanted in zip(answers, own, strict=True):
        if wanted.error:
            assert (answer.refusal, answer.said) == (wanted.error, {})
            continue
        assert [each["class"] for each in answer.said["predictions"]] == [each["class"] for each in wanted.answer["predictions"]]
        probabilities = [each["probability"] for each in wanted.answer["predictions"]]
        assert np.allclose([each["probability"] for each in answer.said["predictions"]], probabilities, atol=1e-5)
        assert answer.said.get("cut", False) == wanted.was_cut
    assert [answer.said.get("cut") for answer in answers] == [None, None, None, True, None]
    assert [answer.batch_images for answer in answers] == [5, 0, 0, 0, 0]


def test_a_text_may_come_as_json_and_a_pair_has_to(exported: Path) -> None:
    predictor = served(exported)
    (plain,) = asked(predictor, b"the film was good")
    said = asked(predictor, b'"the film was good"', b'["the film was good"]', b'["the film", "was good"]', is_json=True)
    assert [answer.said["label"] for answer in said[:2]] == [plain.said["label"]] * 2
    assert said[0].said["probability"] == pytest.approx(plain.said["probability"], abs=1e-6)
    assert said[2].said["probability"] != pytest.approx(plain.said["probability"], abs=1e-6)


@pytest.mark.parametrize(
    ("body", "is_json", "status", "reason"),
    [
        (b"", False, 400, "empty: there is no text"),
        (b"\xff\xfe", False, 400, "undecodable: b'\\xff\\xfe' at byte 0 is not UTF-8"),
        (b"a\0b", False, 400, "undecodable: a NUL, which is in no text"),
        (b'["a"', True, 400, "undecodable: it is no JSON ("),
        (b'{"text": "a"}', True, 400, 'undecodable: {"text": "a"} is no text and no pair of texts; send a string, or a list of two'),
        (b'["a", "b", "c"]', True, 400, "undecodable: "),
        (b'["a\\u0000b", "c"]', True, 400, "undecodable: "),
        (b'["a", " "]', True, 400, "empty: one of the two texts is"),
        (b"a" * ((1 << 20) + 1), False, 413, "too long: 1048577 bytes"),
    ],
)
def test_a_bad_body_has_a_reason_and_does_not_touch_the_others(
    body: bytes, is_json: bool, status: int, reason: str, exported: Path
) -> None:
    predictor = served(exported)
    (alone,) = asked(predictor, b"we liked it")
    bad, good = predictor.answers([Question(body=body, top=2, is_json=is_json), Question(body=b"we liked it", top=2)])
    assert bad.refusal.startswith(reason)
    assert status_of(bad.refusal) == status
    assert good.said["probability"] == pytest.approx(alone.said["probability"], abs=1e-6)


def test_a_text_that_training_would_have_refused_is_refused(copied: Path) -> None:
    changed(copied, lambda m: m["input"].update(too_long="refuse"))
    (answer,) = asked(served(copied), TEXTS[3].encode())
    assert answer.refusal.startswith("too long: ")
    assert status_of(answer.refusal) == 413


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["input"].update(names=["input_ids"]), "names are not input_ids, attention_mask, token_type_ids"),
        (lambda m: m["input"].update(max_tokens="many"), "max_tokens is no number from 1 up"),
        (lambda m: m["input"].update(pad_token_id=-1), "pad_token_id is no number from 0 up"),
        (lambda m: m["input"].update(too_long="keep"), "too_long is neither cut nor refuse"),
        (lambda m: m["input"].update(tokenizer="config.json"), "tokenizer is not tokenizer.json"),
        (lambda m: m["files"].pop("tokenizer.json"), "is damaged (KeyError: 'tokenizer.json')"),
    ],
)
def test_a_manifest_that_says_nonsense_is_refused(change: Callable[[dict[str, Any]], Any], said: str, copied: Path) -> None:
    changed(copied, change)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_export(str(copied))
    assert said in str(error.value)


def test_another_tokenizer_in_its_place_is_refused(copied: Path) -> None:
    (copied / "tokenizer.json").write_bytes((copied / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged or another file"):
        served(copied)


def test_the_front_tells_json_by_its_header_alone() -> None:
    questions: list[Question] = []

    async def ask(question: Question) -> Answer:
        questions.append(question)
        return Answer(said={"label": "pos"})

    async def send() -> list[int]:
        client = Client(ask, allow_unauthenticated=True)
        headers = [{"content-type": kind} for kind in ("application/json", "Application/JSON; charset=utf-8", "text/plain", "")]
        return [(await client.send("POST", "/predict", b'"a"', each))[0] for each in headers]

    assert asyncio.run(send()) == [200] * 4
    assert [(question.body, question.is_json) for question in questions] == [(b'"a"', each) for each in (True, True, False, False)]
    assert json.loads(questions[0].body) == "a"

"""deploy/serve without Ray: what may be served, who may ask and how often, and what is answered. test_serve_ray.py has the real server."""

import asyncio
import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataio.codecs.image.sniff import KINDS
from tests.deploy.exported import by_hand, export
from tests.deploy.rules import PROJECT
from trainer.export.model_folder import load_export
from trainer.inference.predictor import Predictor as RunsPredictor
from trainer.runs.model_files import find_model

pytest.importorskip("starlette", reason="the extra serve is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra serve is not installed")

from starlette.requests import Request

from deploy.serve import __main__ as command
from deploy.serve import meters
from deploy.serve.exports import open_export, read_model
from deploy.serve.front import Front, ModelAway, status_of
from deploy.serve.limits import SECOND_NS, TOKEN_VARIABLE, Admission, Full, Rates, TokenBucket, Tokens, read_tokens
from deploy.serve.predictor import Predictor
from deploy.serve.questions import NOT_FINITE, Answer, Question
from deploy.serve.settings import ServeConfig, settings_of

TOKEN, OTHER = "0123456789abcdef-one", "fedcba9876543210-two"
SAMPLES = PROJECT / "dataio" / "samples"


# -- limits


@given(
    per_second=st.floats(0.1, 1000),
    gaps_ns=st.lists(st.integers(0, 3 * SECOND_NS), min_size=1, max_size=60),
)
def test_a_bucket_lets_through_its_rate_and_one_burst_and_says_when_to_come_back(per_second: float, gaps_ns: list[int]) -> None:
    bucket = TokenBucket(per_second)
    now, taken = 0, []
    for gap in gaps_ns:
        now += gap
        if (wait := bucket.take(now)) == 0:
            taken.append(now)
        else:
            assert bucket.take(now + wait - 1) > 0  # not a nanosecond earlier
            now += wait
            assert bucket.take(now) == 0
            taken.append(now)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            elapsed = taken[last] - taken[first]
            assert last - first + 1 <= bucket.burst + elapsed // bucket.interval_ns


@given(per_second=st.floats(0.1, 1000), idle_ns=st.integers(0, 100 * SECOND_NS))
def test_a_rested_bucket_gives_its_whole_burst_and_no_more(per_second: float, idle_ns: int) -> None:
    bucket = TokenBucket(per_second)
    assert [bucket.take(idle_ns) for _ in range(bucket.burst)] == [0] * bucket.burst
    assert bucket.take(idle_ns) > 0


def test_each_token_has_a_rate_of_its_own_and_0_is_none() -> None:
    rates = Rates(1.0)
    assert (rates.take("a", 0), rates.take("b", 0)) == (0, 0)
    assert rates.take("a", 0) == SECOND_NS
    assert [Rates(0.0).take("a", 0) for _ in range(100)] == [0] * 100
    with pytest.raises(ValueError, match="lets nothing through"):
        TokenBucket(0.0)


def test_a_place_is_free_again_however_its_request_ended() -> None:
    admission = Admission(2)
    with admission.entered(), pytest.raises(RuntimeError), admission.entered():  # noqa: PT012
        with pytest.raises(Full), admission.entered():
            pass
        raise RuntimeError
    assert admission.inside == 0


def test_a_token_is_known_by_all_of_it_and_nothing_else() -> None:
    tokens = Tokens([TOKEN, OTHER])
    assert tokens.key_of(f"Bearer {TOKEN}") == tokens.key_of(f"bearer  {TOKEN} ") == hashlib.sha256(TOKEN.encode()).hexdigest()
    assert tokens.key_of(f"Bearer {OTHER}") not in ("", tokens.key_of(f"Bearer {TOKEN}"))
    for wrong in (
        "",
        "Bearer",
        "Bearer ",
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN}é",
        "Bearer ü",
    ):
        assert tokens.key_of(wrong) == "", wrong


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n# none yet\n", "there is no token; write one a line"),
        ("short", "token 1 has 5 characters; use 16 or more"),
        (f"{TOKEN}\nwith a blank inside it", "token 2 has characters that no bearer token has"),
    ],
)
def test_a_token_that_protects_nothing_is_refused_and_not_shown(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_tokens(str(tmp_path / "tokens"), {})
    assert str(error.value).startswith(f"--token-file {tmp_path / 'tokens'}: ")
    assert not {"short", TOKEN, "with a blank"} & {word for word in ("short", TOKEN, "with a blank") if word in str(error.value)}


def test_tokens_come_from_the_file_else_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"# for the shop\n{TOKEN}\n\n")
    from_file = read_tokens(str(tmp_path / "tokens"), {TOKEN_VARIABLE: OTHER})
    assert from_file is not None
    assert from_file.key_of(f"Bearer {TOKEN}")
    assert not from_file.key_of(f"Bearer {OTHER}")
    from_environment = read_tokens("", {TOKEN_VARIABLE: f"{TOKEN}\n{OTHER}"})
    assert from_environment is not None
    assert from_environment.key_of(f"Bearer {OTHER}")
    assert read_tokens("", {TOKEN_VARIABLE: " "}) is read_tokens("", {}) is None
    with pytest.raises(ValueError, match="cannot be read"):
        read_tokens(str(tmp_path / "missing"), {})


# -- settings


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"export": "x", "replicas": 0}, "replicas=0: input should be greater than or equal to 1"),
        ({"export": "x", "max_batch": 5000}, "max_batch=5000: input should be less than or equal to 4096"),
        ({"export": "x", "max_quued": 5}, "max_quued is no setting; the settings are export, replicas,"),
        ({"replicas": 2}, "export is missing; it names the folder of an ONNX export"),
        ({"export": "x", "body_seconds": float("nan")}, "body_seconds=nan: input should be a finite number"),
    ],
)
def test_a_wrong_setting_is_told_with_its_rule(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        settings_of(values)


def test_the_command_line_has_a_flag_for_each_setting() -> None:
    assert {*command._FLAGS, "export", "allow_unauthenticated"} == set(ServeConfig.model_fields)


# -- exports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what `finetune export` writes."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_hand(tmp_path_factory.mktemp("by_hand") / "onnx")


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(format="torch"), "has the format torch, and only onnx is served; export the run with --to onnx"),
        (lambda m: m.update(manifest_version=9), "has the version 9, and this program reads 1"),
        (lambda m: m.update(file="../model.onnx", files={"../model.onnx": {"sha256": ""}}), "is damaged (ValueError: file is no name)"),
        (lambda m: m.pop("targets"), "is damaged (KeyError: 'targets')"),
        (lambda m: m["targets"][0].pop("outputs"), "the model's task is one of its own, whose outputs no manifest explains"),
        (lambda m: m["targets"][0].update(outputs=[0, 9]), "the targets' outputs do not follow each other"),
        (lambda m: m.update(temperatures={"label": 0}), "a temperature is no number above 0"),
        (lambda m: m["input"].update(resized_to=[40, 40]), "resized to 40x40 before the graph sees them"),
        (lambda m: m["input"].update(resized_to=[40, 40], resized_by="lanczos"), "resized_by are no square and one of bilinear,"),
        (lambda m: m["input"].update(resized_to=[40, 50], resized_by="bilinear"), "resized_by are no square and one of bilinear,"),
        (lambda m: m.update(threshold=1.5), "threshold is no number between 0 and 1"),
        (lambda m: m["input"].update(decoded_to=["a", 3]), "decoded_to is no size"),
        (lambda m: m["input"].update(std=[0, 1, 1]), "mean and std are not three numbers"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(change: Callable[[dict[str, Any]], Any], said: str, copied: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        open_export(str(changed(copied, change)))
    assert str(copied) in str(error.value)


def test_what_is_no_export_is_refused(tmp_path: Path, exported: Path) -> None:
    for place in (tmp_path, tmp_path / "missing", exported.parent):
        with pytest.raises(ValueError, match=r"is no export: there is no manifest\.json in it"):
            open_export(str(place))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        open_export(str(tmp_path))


def test_a_model_that_is_not_the_manifests_is_refused(copied: Path) -> None:
    data = bytearray((copied / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "model.onnx").write_bytes(data)
    with pytest.raises(ValueError, match="is damaged or another file: its SHA-256 is"):
        Predictor(open_export(str(copied)), ServeConfig(export=str(copied)))
    (copied / "model.onnx").unlink()
    with pytest.raises(ValueError, match="is missing, which the manifest names; copy the whole folder"):
        read_model(open_export(str(copied)))


def test_a_file_that_is_no_graph_is_refused(copied: Path) -> None:
    (copied / "model.onnx").write_bytes(b"no graph")
    changed(copied, lambda m: m["files"]["model.onnx"].update(sha256=hashlib.sha256(b"no graph").hexdigest()))
    with pytest.raises(ValueError, match="ONNX Runtime cannot open the model"):
        Predictor(open_export(str(copied)), ServeConfig(export=str(copied)))


# -- answers


def pictures(count: int) -> list[bytes]:
    """Images of the sample's size, as PNG."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        buffer = io.BytesIO()
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), np.uint8))
        coarse.resize((28, 28), Image.Resampling.BICUBIC).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


@pytest.mark.parametrize("flags", [(), ("--preprocessing",)])
def test_answers_are_those_of_predict_and_of_onnxruntime(flags: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    where = export(folder, *flags)
    changed(where, lambda m: m["temperatures"].update(label=1.7))
    opened = open_export(str(where))
    served = Predictor(opened, ServeConfig(export=str(where), max_batch=4))
    images = pictures(9)
    answers = served.answers([Question(body=image, top=10) for image in images])
    # ... directly, as the manifest tells anybody
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]).transpose(0, 3, 1, 2)  # (n, 3, H, W)
    takes = opened.manifest["input"]
    given: Any = pixels
    if takes["prepared"] == "by the caller":
        mean, std = (np.array(takes[key], np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
        given = (pixels.astype(np.float32) / 255 - mean) / std
    session = onnxruntime.InferenceSession((where / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"images": np.ascontiguousarray(given)})
    tempered = np.exp(outputs / 1.7 - (outputs / 1.7).max(1, keepdims=True))
    probabilities = tempered / tempered.sum(1, keepdims=True)
    for answer, expected in zip(answers, probabilities, strict=True):
        found = {each["index"]: each["probability"] for each in answer.said["predictions"]}
        assert np.allclose([found[index] for index in range(10)], expected, atol=1e-6)
        assert answer.said["index"] == int(expected.argmax())
        assert opened.manifest["classes"][answer.said["index"]] == answer.said["label"]
        assert answer.said["probability"] == max(found.values())
    # ... and by `finetune predict`, whose temperature the run's folder says
    files = []
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(image)
        files.append(str(tmp_path / f"{number}.png"))
    model = find_model(str(folder / "runs" / "plain"))
    assert load_export(model, torch.device("cpu")).temperatures == {}
    changed(where, lambda m: m["temperatures"].clear())
    plain = Predictor(open_export(str(where)), ServeConfig(export=str(where))).answers([Question(body=image, top=3) for image in images])
    for answer, prediction in zip(plain, RunsPredictor(model).predict(files, top=3), strict=True):
        own = prediction.answer["predictions"]
        assert [each["class"] for each in answer.said["predictions"]] == [each["class"] for each in own]
        assert np.allclose([e["probability"] for e in answer.said["predictions"]], [e["probability"] for e in own], atol=1e-5)


def test_a_bad_image_does_not_touch_the_others_of_its_batch_and_the_batch_counts_once(exported: Path) -> None:
    served = Predictor(open_export(str(exported)), ServeConfig(export=str(exported)))
    one, other = pictures(2)
    alone = [served.answers([Question(body=image, top=3)])[0] for image in (one, other)]
    together = served.answers([Question(body=image, top=3) for image in (one, b"no image", other, b"")])
    assert np.allclose([together[index].said["probability"] for index in (0, 2)], [each.said["probability"] for each in alone], atol=1e-6)
    assert [each.said["label"] for each in (together[0], together[2])] == [each.said["label"] for each in alone]
    assert together[1].refusal.startswith("unknown format: begins with 6e6f")
    assert together[3].refusal == "empty: no bytes"
    assert [each.batch_images for each in together] == [4, 0, 0, 0]
    assert together[0].batch_seconds > 0


def test_several_targets_are_answered_as_predict_does(copied: Path) -> None:
    """The ten outputs of the same graph, told as a label, several labels and a number."""
    targets = [
        {"name": "animal", "kind": "label", "classes": ["ant", "bee", "cat"], "outputs": [0, 3]},
        {"name": "seen", "kind": "labels", "classes": [f"label {number}" for number in range(6)], "outputs": [3, 9]},
        {"name": "age", "kind": "number", "classes": [], "outputs": [9, 10], "mean": 4.0, "std": 2.0},
    ]
    changed(copied, lambda m: m.update(targets=targets, temperatures={}))
    served = Predictor(open_export(str(copied)), ServeConfig(export=str(copied), threshold=0.01))
    (answer,) = served.answers([Question(body=pictures(1)[0], top=2)])
    decoded = np.asarray(Image.open(io.BytesIO(pictures(1)[0])).convert("RGB"))[None]
    (row,) = served.outputs(served.preparation.inputs(decoded))
    heads = answer.said["heads"]
    assert heads["animal"]["index"] == int(row[:3].argmax())
    assert [each["index"] for each in heads["animal"]["predictions"]] == np.argsort(-row[:3])[:2].tolist()
    assert [each["class"] for each in heads["seen"]["labels"]] == [f"label {index}" for index in np.argsort(-row[3:9])[:2]]
    assert heads["age"]["value"] == pytest.approx(float(row[9]) * 2 + 4, rel=1e-5)


def test_images_are_resized_by_the_filter_that_the_manifest_names(folder: Path, tmp_path: Path) -> None:
    where = export(folder, run="resized", image_size=40)
    opened = open_export(str(where))
    assert (opened.manifest["input"]["resized_to"], opened.manifest["input"]["resized_by"]) == ([40, 40], "bicubic")
    served = Predictor(opened, ServeConfig(export=str(where)))
    images = pictures(5)
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    runs = RunsPredictor(find_model(str(folder / "runs" / "resized")), device=torch.device("cpu"))
    expected = list(runs.predict(list(map(str, paths)), top=3))
    answers = served.answers([Question(body=image, top=3) for image in images])
    for answer, own in zip(answers, expected, strict=True):
        assert [each["class"] for each in answer.said["predictions"]] == [each["class"] for each in own.answer["predictions"]]
        probabilities = [each["probability"] for each in own.answer["predictions"]]
        assert [each["probability"] for each in answer.said["predictions"]] == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize(("given", "expected"), [({}, 700), ({"max_image_pixels": 5000}, 5000)])
def test_the_limit_of_an_image_is_the_runs_own_unless_one_is_given(given: dict[str, Any], expected: int, copied: Path) -> None:
    changed(copied, lambda m: m["input"].update(max_image_pixels=700))
    served = Predictor(open_export(str(copied)), ServeConfig(export=str(copied), **given))
    (answer,) = served.answers([Question(body=pictures(1)[0], top=3)])  # 28x28
    assert answer.refusal.startswith("too large") == (expected < 28 * 28)


@pytest.mark.parametrize(("own", "given", "labels"), [(0.01, {}, 10), (0.99999, {}, 0), (0.99999, {"threshold": 0.01}, 10)])
def test_the_threshold_is_the_runs_own_unless_one_is_given(own: float, given: dict[str, Any], labels: int, copied: Path) -> None:
    targets = [{"name": "seen", "kind": "labels", "classes": [f"label {number}" for number in range(10)], "outputs": [0, 10]}]
    changed(copied, lambda m: m.update(targets=targets, temperatures={}, threshold=own))
    served = Predictor(open_export(str(copied)), ServeConfig(export=str(copied), **given))
    (answer,) = served.answers([Question(body=pictures(1)[0], top=10)])
    assert len(answer.said["labels"]) == labels


def test_every_reason_of_the_codec_has_a_status() -> None:
    found = {kind: status_of(f"{kind}: detail") for kind in KINDS}
    assert {kind for kind, status in found.items() if status == 415} == {"unknown format", "unsupported", "animated"}
    assert {kind for kind, status in found.items() if status == 413} == {"too large"}
    assert set(found.values()) == {400, 413, 415}
    assert status_of(NOT_FINITE) == 500


# -- front


class Client:
    """Sends requests to a Front, in this process and one loop."""

    def __init__(self, ask: Callable[[Question], Awaitable[Answer]], *, tokens: Tokens | None = None, **settings: Any) -> None:
        self.now_ns = 0
        self.front = Front(ServeConfig(export="x", **settings), tokens, ask=ask, describe=self._describe, clock_ns=lambda: self.now_ns)

    async def _describe(self) -> Mapping[str, Any]:
        return {"of": {"run": "plain", "model_sha256": "a" * 64}, "file": "m", "files": {"m": {"sha256": "b" * 64}}}

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | AsyncIterator[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        *,
        length: bool = True,
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON (or text)."""
        path, _, query = path.partition("?")
        given = dict(headers or {}) | ({"content-length": str(len(body))} if isinstance(body, bytes) and length else {})
        pieces = body if not isinstance(body, bytes) else _pieces(body)

        async def receive() -> Any:
            try:
                return {"type": "http.request", "body": await anext(pieces), "more_body": True}
            except StopAsyncIteration:
                return {"type": "http.request", "body": b"", "more_body": False}

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(key.encode(), value.encode("latin-1")) for key, value in given.items()],
            "server": ("127.0.0.1", 80),
            "scheme": "http",
        }
        response = await self.front.respond(Request(scope, receive))
        text = bytes(response.body).decode()
        is_json = response.headers.get("content-type") == "application/json"
        return response.status_code, dict(response.headers), json.loads(text) if is_json else text

    async def counted(self, route: str, status: str) -> float:
        _, _, text = await self.send("GET", "/metrics", headers={"authorization": f"Bearer {TOKEN}"})
        found = re.search(rf'^finetune_serve_requests_total{{route="{route}",status="{status}"}} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def said(question: Question) -> Answer:
    return Answer(said={"label": "bee", "top": question.top, "bytes": len(question.body)}, batch_images=1, batch_seconds=0.5)


def test_routes_and_their_statuses() -> None:
    async def go() -> None:
        client = Client(said)
        assert (await client.send("GET", "/health"))[0] == 503
        assert (await client.send("GET", "/model"))[0] == 503
        client.front.look_for_the_model()
        while (await client.send("GET", "/health"))[0] != 200:
            await asyncio.sleep(0)
        assert (await client.send("GET", "/model"))[2]["of"]["run"] == "plain"
        assert (await client.send("POST", "/predict?top=5", b"1234"))[::2] == (200, {"label": "bee", "top": 5, "bytes": 4})
        assert (await client.send("POST", "/predict", b"1"))[2]["top"] == 3
        assert (await client.send("GET", "/predict"))[0:3:2] == (405, {"error": "/predict takes POST"})
        assert (await client.send("GET", "/../\x1b[31m"))[2] == {
            "error": "/../\\x1b[31m is nothing here; there are /predict, /health, /model, /metrics"
        }
        for top in ("0", "-1", "a", "1" * 9, "²"):
            assert (await client.send("POST", f"/predict?top={top}", b"1"))[0] == 400
        assert (await client.send("POST", "/predict", b"1", {"content-length": "1_0"}, length=False))[0] == 400
        assert await client.counted("predict", "200") == 2
        assert await client.counted("other", "404") == 1

    asyncio.run(go())


def test_without_the_token_there_is_health_and_nothing_else() -> None:
    async def go() -> None:
        asked: list[Question] = []

        async def ask(question: Question) -> Answer:
            asked.append(question)
            return await said(question)

        client = Client(ask, tokens=Tokens([TOKEN]))
        for method, path in (("POST", "/predict"), ("GET", "/model"), ("GET", "/metrics")):
            for headers in ({}, {"authorization": f"Bearer {OTHER}"}):
                status, given, answer = await client.send(method, path, b"", headers)
                assert (status, given["www-authenticate"]) == (401, "Bearer")
                assert OTHER not in str(answer)
        assert not asked
        assert (await client.send("GET", "/health"))[0] == 503  # not ready, and not 401
        assert (await client.send("POST", "/predict", b"1", {"authorization": f"Bearer {TOKEN}"}))[0] == 200
        assert await client.counted("predict", "401") == 2

    asyncio.run(go())


def test_a_long_body_is_refused_before_it_is_read() -> None:
    async def go() -> None:
        client = Client(said, max_body_bytes=10)
        read: list[int] = []

        async def endless() -> AsyncIterator[bytes]:
            while True:
                read.append(4)
                yield b"1234"

        status, headers, answer = await client.send("POST", "/predict", endless(), {"content-length": "11"})
        assert (status, headers["connection"], read) == (413, "close", [])
        assert answer == {"error": "the body has more than 10 bytes, the most that is taken; send a smaller one"}
        assert (await client.send("POST", "/predict", endless()))[0] == 413  # nothing announced, or a lie
        assert sum(read) == 12
        assert (await client.send("POST", "/predict", b"1234567890"))[0] == 200
        assert client.front._admission.inside == 0

    asyncio.run(go())


def test_a_slow_client_is_not_waited_for() -> None:
    async def go() -> None:
        client = Client(said, body_seconds=0.01)

        async def silent() -> AsyncIterator[bytes]:
            yield b"12"
            await asyncio.Event().wait()

        assert (await client.send("POST", "/predict", silent(), {"content-length": "4"}))[0] == 408
        assert client.front._admission.inside == 0

    asyncio.run(go())


def test_overload_is_answered_503_and_only_that_and_then_all_is_as_before() -> None:
    async def go() -> None:
        may_answer = asyncio.Event()

        async def ask(question: Question) -> Answer:
            await may_answer.wait()
            return await said(question)

        client = Client(ask, max_queued=3)
        requests = [asyncio.create_task(client.send("POST", "/predict", b"1")) for _ in range(10)]
        while sum(each.done() for each in requests) < 7:
            await asyncio.sleep(0)
        refused = [each.result() for each in requests if each.done()]
        assert [(status, headers["retry-after"]) for status, headers, _ in refused] == [(503, "1")] * 7
        assert "finetune_serve_queued_requests 3.0" in (await client.send("GET", "/metrics"))[2]
        assert (await client.send("GET", "/health"))[2] == {"status": "not ready"}  # answered at once, whatever waits
        may_answer.set()
        assert sorted(status for status, _, _ in await asyncio.gather(*requests)) == [200] * 3 + [503] * 7
        assert (await client.send("POST", "/predict", b"1"))[0] == 200

    asyncio.run(go())


def test_a_client_that_leaves_takes_no_place_and_is_counted() -> None:
    async def go() -> None:
        client = Client(said, max_queued=1)

        async def begun() -> AsyncIterator[bytes]:
            yield b"1"
            await asyncio.Event().wait()

        request = asyncio.create_task(client.send("POST", "/predict", begun()))
        while client.front._admission.inside == 0:
            await asyncio.sleep(0)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
        assert (await client.send("POST", "/predict", b"1"))[0] == 200
        assert await client.counted("predict", "gone") == 1

    asyncio.run(go())


def test_a_rate_is_a_tokens_own_and_says_when_to_come_back() -> None:
    async def go() -> None:
        client = Client(said, tokens=Tokens([TOKEN, OTHER]), requests_per_second=0.25)
        one, other = ({"authorization": f"Bearer {token}"} for token in (TOKEN, OTHER))
        assert (await client.send("POST", "/predict", b"1", one))[0] == 200
        status, headers, answer = await client.send("POST", "/predict", b"1", one)
        assert (status, headers["retry-after"], answer) == (429, "4", {"error": "more than 0.25 requests a second"})
        assert (await client.send("POST", "/predict", b"1", other))[0] == 200
        assert (await client.send("GET", "/metrics", headers=one))[0] == 200  # only answers of the model are limited
        client.now_ns += 4 * SECOND_NS
        assert (await client.send("POST", "/predict", b"1", one))[0] == 200

    asyncio.run(go())


@pytest.mark.parametrize("fault", [ModelAway(), None])
def test_a_model_that_is_away_is_503_until_it_answers_again(fault: Exception | None) -> None:
    async def go() -> None:
        is_away = True

        async def ask(question: Question) -> Answer:
            if is_away and fault is None:
                await asyncio.Event().wait()
            if is_away:
                raise ModelAway
            return await said(question)

        client = Client(ask, answer_seconds=0.01)
        client.front.look_for_the_model()
        assert (await client.send("POST", "/predict", b"1"))[0] == 503
        is_away = False
        while (await client.send("GET", "/health"))[0] != 200:
            await asyncio.sleep(0)
        assert (await client.send("POST", "/predict", b"1"))[0] == 200
        assert client.front._admission.inside == 0

    asyncio.run(go())


def test_what_fails_unforeseen_is_500_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        async def ask(question: Question) -> Answer:
            raise RuntimeError("inside words")

        client = Client(ask)
        assert (await client.send("POST", "/predict", b"1"))[::2] == (500, {"error": "the server failed; its log says why"})
        assert await client.counted("predict", "500") == 1

    asyncio.run(go())
    assert "inside words" in caplog.text


def test_the_codecs_reason_is_shown_as_foreign_text_is() -> None:
    async def go() -> None:
        async def ask(question: Question) -> Answer:
            return Answer(refusal="unknown format: \x1b]0;title\x07")

        status, _, answer = await Client(ask).send("POST", "/predict", b"1")
        assert (status, answer) == (415, {"error": "unknown format: \\x1b]0;title\\x07"})

    asyncio.run(go())


# -- metrics, docs, the command line


def test_batches_and_times_are_counted() -> None:
    async def go() -> None:
        client = Client(said)
        for _ in range(3):
            await client.send("POST", "/predict", b"1")
        _, _, text = await client.send("GET", "/metrics")
        for line in (
            "serve_batch_images_count 3.0",
            "serve_batch_seconds_sum 1.5",
            "serve_request_seconds_count 3.0",
            "serve_max_queued_requests 64.0",
        ):
            assert f"finetune_{line}\n" in text
        assert "_created" not in text

    asyncio.run(go())


def test_names_follow_the_runs_metrics() -> None:
    for row in meters.ROWS:
        assert row.full_name.startswith("finetune_serve_")
        assert row.full_name.endswith("_total") == (row.kind == "counter")
        assert bool(row.buckets) == (row.kind == "histogram")


def test_the_page_has_the_table_of_metrics_and_every_setting() -> None:
    page = (PROJECT / "docs" / "serve.md").read_text()
    assert meters.table() in page
    for name in command._FLAGS:
        assert f"`--{name.replace('_', '-')}`" in page, name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is reached from other machines, and there is no token"),
        (["--replicas", "0"], "--replicas 0: input should be greater than or equal to 1"),
        (["--port", "0"], "--port 0 is no port"),
        (["--token-file", "missing"], "--token-file missing cannot be read"),
    ],
)
def test_wrong_arguments_end_with_2_before_ray_starts(
    flags: list[str], said: str, exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as stop:
        command.main([str(exported), *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_folder_that_is_none_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit):
            command.main([str(tmp_path), "--port", str(taken.getsockname()[1])])
    assert "cannot be listened on (Address already in use); choose another --port" in capsys.readouterr().err
    from tests.ports import free_ports

    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path), "--port", str(free_ports(1)[0])])
    assert stop.value.code == 2
    assert "is no export" in capsys.readouterr().err

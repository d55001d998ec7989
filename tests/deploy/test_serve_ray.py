"""deploy/serve on a real Ray Serve: one server on this machine, asked over HTTP. It waits for what happens, however long that takes."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.deploy.exported import CLASSES, by_hand
from tests.deploy.rules import PROJECT
from tests.ports import free_ports

pytest.importorskip("ray.serve", reason="the extra serve is not installed", exc_type=ImportError)
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra serve is not installed")

from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

TOKEN = "0123456789abcdef-one"
ROOM = 4
"""Requests under way at once."""
BODY_BYTES = 20_000


@dataclass(frozen=True, kw_only=True)
class Server:
    port: int
    export: Path
    process: "subprocess.Popen[str]"

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers, JSON or text; with the token unless `headers` are given."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            connection.request(method, path, body, dict(headers if headers is not None else {"Authorization": f"Bearer {TOKEN}"}))
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers["content-type"] == "application/json"
            return response.status, response.headers, json.loads(text) if is_json else text

    def value(self, series: str) -> float:
        """Of a series of /metrics; 0 if it is not there."""
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.ask("GET", "/metrics")[2], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def begun(self, body: bytes) -> socket.socket:
        """A connection on which a request has begun, whose last byte is missing."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=600)
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[:-1])
        return connection


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    export = by_hand(folder / "onnx")
    (folder / "tokens").write_text(f"{TOKEN}\n")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "deploy.serve", str(export), "--port", str(port), "--token-file", str(folder / "tokens")]
    command += ["--replicas", "2", "--threads", "1", "--max-batch", "4", "--max-queued", str(ROOM), "--max-body-bytes", str(BODY_BYTES)]
    command += ["--body-seconds", "900", "--answer-seconds", "900"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("listening on "):
                break
        assert "".join(said[-1:]).startswith(f"listening on http://127.0.0.1:{port} "), "".join(said)
        assert TOKEN not in "".join(said)
        yield Server(port=port, export=export, process=process)
    finally:
        process.terminate()
        process.stdout.read()
        process.wait()


def sample_images(count: int) -> list[bytes]:
    """Encoded images of the sample."""
    (file,) = sorted((PROJECT / "dataio" / "samples" / "fashion_mnist").glob("test*.parquet"))
    found: list[bytes] = pq.read_table(file).column("image").slice(0, count).to_pylist()
    return found


def until(happened: Any) -> None:
    """Wait until it is so; pytest's own limit is the only one."""
    while not happened():
        time.sleep(0.05)


def test_answers_are_onnxruntimes(server: Server) -> None:
    images = sample_images(12)
    answers = [server.ask("POST", "/predict?top=10", image) for image in images]
    assert [status for status, _, _ in answers] == [200] * 12
    session = onnxruntime.InferenceSession((server.export / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    for image, (_, _, said) in zip(images, answers, strict=True):
        with Image.open(io.BytesIO(image)) as opened:
            pixels = np.asarray(opened.convert("RGB"), np.float32).transpose(2, 0, 1)[None]  # (1, 3, H, W)
        (outputs,) = session.run(None, {"images": np.ascontiguousarray((pixels / 255 - np.float32(0.5)) / np.float32(0.25))})
        tempered = np.exp(outputs[0].astype(np.float64) / 1.5)
        expected = tempered / tempered.sum()
        assert [each["index"] for each in said["predictions"]] == np.argsort(-expected, kind="stable").tolist()
        assert np.allclose([each["probability"] for each in said["predictions"]], np.sort(expected)[::-1], atol=1e-5)
        assert (said["label"], said["index"]) == (CLASSES[int(expected.argmax())], int(expected.argmax()))


def test_who_has_no_token_learns_only_whether_it_is_ready(server: Server) -> None:
    until(lambda: server.ask("GET", "/health", headers={})[0] == 200)
    for method, path in (("POST", "/predict"), ("GET", "/model"), ("GET", "/metrics")):
        for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}):
            assert server.ask(method, path, headers=headers)[0] == 401
    status, _, about = server.ask("GET", "/model")
    assert (status, about["classes"], about["of"]["run"]) == (200, list(CLASSES), "by hand")


def test_what_is_no_image_and_what_is_too_long(server: Server) -> None:
    status, _, said = server.ask("POST", "/predict", b"no image")
    assert (status, said["error"][:14]) == (415, "unknown format")
    assert server.ask("POST", "/predict", sample_images(1)[0][:-8])[0] == 400
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), timeout=600)) as connection:
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {BODY_BYTES + 1}\r\n\r\n"
        connection.sendall(head.encode())  # and nothing of the body
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_overload_is_503_and_nothing_else_breaks(server: Server) -> None:
    """Requests whose last byte is missing fill the room, as slow ones do."""
    image = sample_images(1)[0]
    before = server.value('finetune_serve_requests_total{route="predict",status="503"}')
    with contextlib.ExitStack() as stack:
        begun = [stack.enter_context(contextlib.closing(server.begun(image))) for _ in range(ROOM)]
        until(lambda: server.value("finetune_serve_queued_requests") == ROOM)
        for _ in range(20):
            status, headers, _ = server.ask("POST", "/predict", image)
            assert (status, headers["retry-after"]) == (503, "1")
        assert server.ask("GET", "/health")[0] == 200  # full is not broken
        for connection in begun:
            connection.sendall(image[-1:])
        assert [connection.recv(100).split(b" ")[1] for connection in begun] == [b"200"] * ROOM
    until(lambda: server.value("finetune_serve_queued_requests") == 0)
    assert server.ask("POST", "/predict", image)[0] == 200
    assert server.value('finetune_serve_requests_total{route="predict",status="503"}') == before + 20


def test_a_client_that_leaves_gives_its_place_back(server: Server) -> None:
    with contextlib.closing(server.begun(sample_images(1)[0])):
        until(lambda: server.value("finetune_serve_queued_requests") == 1)
    until(lambda: server.value("finetune_serve_queued_requests") == 0)


def test_metrics_are_the_whole_servers(server: Server) -> None:
    """Whichever of the two replicas has computed."""
    images = sample_images(8)
    answered, computed = "finetune_serve_request_seconds_count", "finetune_serve_batch_images_sum"
    before = server.value(answered), server.value(computed)
    assert [server.ask("POST", "/predict", image)[0] for image in images] == [200] * 8
    assert (server.value(answered), server.value(computed)) == (before[0] + 8, before[1] + 8)
    assert server.value("finetune_serve_ready") == 1
    info = f'finetune_serve_model_info{{file_sha256="{server.ask("GET", "/model")[2]["files"]["model.onnx"]["sha256"][:16]}"'
    assert f'{info},model_sha256="{"0" * 16}",trained_by="by hand"}} 1.0' in server.ask("GET", "/metrics")[2]


def test_ctrl_c_ends_it_and_leaves_nothing(server: Server) -> None:
    """The last test of this server."""
    server.process.send_signal(signal.SIGINT)
    assert server.process.stdout is not None
    assert server.process.stdout.read().endswith("SIGINT: stopped serving\n")
    assert server.process.wait() == 128 + signal.SIGINT
    end = time.monotonic() + 30
    while accepts(server.port) and time.monotonic() < end:  # another test may have the port for a moment
        time.sleep(0.2)
    assert not accepts(server.port)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True

"""A model is pushed to a hub whole, verified, in one commit. The hub is a stand-in for what of Hugging Face's API takes commits."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.test_export_elsewhere import export
from trainer.push import main
from trainer.settings.tree import ModelConfig

REPOSITORY = Path(__file__).parents[2]
TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Repositories with their files; large files come by LFS, as safetensors do."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.is_private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.messages: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials in Authorization header"}, status=401)
            return
        body, hub = self.body(), self.server
        path, _, _ = self.path.partition("?")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.repositories.setdefault(name, {})
            hub.is_private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            self.answer({"url": f"{hub.address}/{name}", "name": name, "id": "1"})
        elif "/preupload/" in path:
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": each, "uploadMode": "lfs" if each.endswith(".safetensors") else "regular"} for each in files]
            self.answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self.answer({"transfer": "basic", "objects": [self.upload(each) for each in objects]})
        elif path == "/api/validate-yaml":  # the card's heading
            assert json.loads(body)["content"].startswith("---\n")
            self.answer({"errors": [], "warnings": []})
        else:
            assert "/commit/" in path, path
            self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], [json.loads(line) for line in body.splitlines()])

    def upload(self, each: dict[str, Any]) -> dict[str, Any]:
        return each | {"authenticated": True, "actions": {"upload": {"href": f"{self.server.address}/store/{each['oid']}"}}}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    self.server.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.stored[value["oid"]]
        self.server.repositories[name] |= files
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/abc", "commitOid": "abc", "hookOutput": "", "success": True})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while length := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = export(tmp_path_factory.mktemp("runs"), ModelConfig(name="timm/test_efficientnet"))
    return model


def push(hub: Hub, *words: str, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
    """The command, as the client reads its settings once, when it is imported."""
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "trainer.command", "push", *words]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False)


def test_the_model_folder_is_on_the_hub_in_one_commit(hub: Hub, folder: Path) -> None:
    done = push(hub, str(folder.parent), "me/ants")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/ants/commit/abc" in done.stdout
    there = hub.repositories["me/ants"]
    assert there.keys() == {"model.safetensors", "config.json", "README.md"}
    assert all(there[name] == (folder / name).read_bytes() for name in ("model.safetensors", "config.json"))
    heading = "---\nlibrary_name: timm\npipeline_tag: image-classification\n---\n\n"
    assert there["README.md"].decode() == heading + (folder / "README.md").read_text()
    assert (hub.is_private["me/ants"], hub.messages) == (True, ["The model of the run run"])
    assert hub.stored.keys() == {hashlib.sha256(there["model.safetensors"]).hexdigest()}


def test_a_hub_that_refuses_is_told_without_a_traceback_or_the_token(hub: Hub, folder: Path) -> None:
    done = push(hub, str(folder), "me/ants", token="hf_wrong")
    assert done.returncode == 1
    assert "error: the hub did not take it: " in done.stderr
    assert "`hf auth login`, or set HF_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "hf_wrong" not in done.stderr + done.stdout
    assert not hub.repositories


def test_nothing_of_a_damaged_model_is_pushed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = export(tmp_path, ModelConfig(name="timm/test_efficientnet"))
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "run"), "me/ants"])
    assert stop.value.code == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err


def test_without_the_extra_it_says_which(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit):
        main([str(folder), "me/ants"])
    assert 'pip install "huggingface_hub>=1.0" (extra `hub`)' in capsys.readouterr().err

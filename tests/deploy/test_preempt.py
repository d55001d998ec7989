"""deploy/preempt.py: the hook of a node that is about to go, with real processes and a real metadata service of the test's own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy import preempt

# Stand-ins: what the hook goes by is the command line, and what the log says.
DRIVER = """
import signal, sys, time
def stop(number, frame):
    print("SIGTERM: saving a checkpoint, then stopping", flush=True)
    if heard: print("a second one", flush=True)
    heard.append(number)
heard = []
signal.signal(signal.SIGTERM, stop)
print("training", flush=True)
while not heard: time.sleep(0.02)
time.sleep(float(sys.argv[1]))
print("saved", flush=True)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process whose command line says `-m MODULE`; the hook is to know it by that name. Its log is `tmp_path/log`."""
    started: list[subprocess.Popen[bytes]] = []

    def run(program: str, *words: str, module: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-c", program, *words, "-m", module], stdout=log)
        started.append(process)
        end = time.monotonic() + 20
        while process.pid not in preempt.processes(module):  # Popen returns before the kernel shows the new command line
            assert time.monotonic() < end, f"{module} cannot be seen"
            time.sleep(0.001)
        return process

    # Not the real names: runs of other tests may be at work on this machine.
    monkeypatch.setattr(preempt, "DRIVER", f"test.driver.{os.getpid()}")
    monkeypatch.setattr(preempt, "ZYGOTE", f"test.zygote.{os.getpid()}")
    yield run
    for process in started:
        process.kill()
        process.wait()


def reap(process: subprocess.Popen[bytes]) -> None:
    """As a container's first process does for all."""
    threading.Thread(target=process.wait, daemon=True).start()


def has_ended(pid: int) -> bool:
    """Not by Popen.poll(), which knows nothing while the thread that reaps is inside wait()."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == b""
    except OSError:
        return True


def wait_for(log: Path, text: str) -> None:
    end = time.monotonic() + 20
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def test_the_heads_hook_stops_the_driver_once_and_waits_until_it_has_saved(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = start(DRIVER, "0.5", module=preempt.DRIVER)
    reap(process)
    wait_for(tmp_path / "log", "training")
    assert preempt.head(30) == 0
    assert (tmp_path / "log").read_text().splitlines() == ["training", "SIGTERM: saving a checkpoint, then stopping", "saved"]


def test_a_driver_that_was_told_to_stop_is_not_told_again(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """KubeRay stops the job of a RayJob that is deleted, then its pods: a second SIGTERM would end the run without a commit."""
    process = start(DRIVER, "2.5", module=preempt.DRIVER)
    reap(process)
    wait_for(tmp_path / "log", "training")
    process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "log", "SIGTERM: ")  # which a real driver says within the hook's HEARD_SECONDS
    assert preempt.head(30) == 0
    assert "a second one" not in (tmp_path / "log").read_text()
    assert "saved" in (tmp_path / "log").read_text()


def test_without_a_driver_the_head_goes_at_once(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    assert preempt.head(0) == 0


def test_the_workers_hook_gives_notice_drains_and_waits_for_the_ranks(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = tmp_path / "deep" / "preempted"
    drained: list[tuple[float, bool]] = []
    monkeypatch.setattr(preempt, "drain", lambda seconds, **_: drained.append((seconds, notice.exists())))
    process = start("import sys, time; time.sleep(float(sys.argv[1]))", "0.5", module=preempt.ZYGOTE)
    reap(process)
    assert preempt.worker(notice, 30) == 0
    assert drained == [(30, True)]  # the notice is seen at once, draining takes seconds
    assert has_ended(process.pid)


def test_a_rank_that_stays_too_long_is_left(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preempt, "drain", lambda *_, **__: None)
    process = start("import time; time.sleep(60)", module=preempt.ZYGOTE)
    assert preempt.worker(tmp_path / "preempted", 0) == 1
    assert f"process {process.pid}" in capsys.readouterr().err
    assert process.poll() is None


def test_a_head_that_is_gone_is_said_and_stops_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preempt, "DRAIN_SECONDS", 0.01)
    preempt.drain(30, address="127.0.0.1:1")
    assert "this node is not drained" in capsys.readouterr().err


def test_the_end_of_a_spot_instance_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Version 2 of the metadata: a token first; 404 as long as nothing is planned."""
    asked: list[str] = []

    class Metadata(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.answer(200, b"a-token")

        def do_GET(self) -> None:
            has_token = self.headers.get("X-aws-ec2-metadata-token") == "a-token"
            asked.append(self.path)
            if not has_token:
                self.answer(401, b"")
            elif len(asked) < 3:
                self.answer(404, b"")
            else:
                self.answer(200, b'{"action": "terminate"}')

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(preempt, "SPOT_POLL_SECONDS", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        preempt.watch_spot(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == ["/latest/meta-data/spot/instance-action"] * 3
    said = capsys.readouterr()
    assert (said.out, said.err) == ('this spot instance is about to go: {"action": "terminate"}\n', "")

"""python -m deploy.up: Prometheus, and Grafana if it is installed, for all runs under a storage folder, until Ctrl-C.

The runs write what is scraped (`<storage>/<run>/prometheus-targets.json`); deploy.prometheus defines the alerts, deploy.grafana the
dashboards. Everything listens on loopback. With Docker, deploy/compose.yaml does the same.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from cluster.names import FILE_SD
from deploy.preview import DASHBOARD_NAMES, draw
from deploy.prometheus import rules
from trainer.settings.tree import RunConfig

HERE = Path(__file__).resolve().parent
RUNBOOK = HERE.parent / "docs" / "alerts.md"
HOST = "127.0.0.1"
READY_SECONDS = 60.0
PREVIEW_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after Ctrl-C or SIGTERM, 1 if a child ended by itself, 2 for a wrong setting."""
    default = RunConfig().storage
    parser = argparse.ArgumentParser(prog="python -m deploy.up", description="Prometheus and Grafana for all runs under a storage folder.")
    parser.add_argument("--storage", default=default, metavar="DIR", help="the runs' folder (default: %(default)s)")
    parser.add_argument("--discovery", action="append", default=[], metavar="HOST:PORT", help="also runs whose discovery port this is")
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--grafana-port", type=int, default=3000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="keep what was scraped here; default: a temporary folder, gone at the end")
    parser.add_argument("--scrape-seconds", type=float, default=5.0, help="between two scrapes (default: %(default)s)")
    parser.add_argument("--preview", action="store_true", help="draw the dashboards of the newest run as pictures, for want of Grafana")
    options = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        if options.scrape_seconds < 0.1:
            raise ValueError(f"--scrape-seconds {options.scrape_seconds} must be at least 0.1; 5 is the default")
        storage = runs_folder(options.storage, is_default=options.storage == default)
        with ExitStack() as stack:
            folder = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finetune-up-")))
            return _serve(options, storage, folder.resolve(), stop, stack)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def runs_folder(storage: str, *, is_default: bool = False) -> Path:
    """The folder to watch, absolute. ValueError for a URI, and for a missing folder, unless it is the default one, which the first run
    creates."""
    if "://" in storage:
        raise ValueError(
            f"--storage {storage} is not a folder of this machine: runs leave their ranks' addresses only in those; start the run with "
            "--cluster.discovery-port 9410 and give --discovery HOST:9410 here, without --storage"
        )
    path = Path(storage).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"--storage {storage} is a file; give the folder that the runs' folders are in")
    if not path.exists() and not is_default:
        raise ValueError(f"--storage {storage} does not exist; give the folder that runs are stored in, or make it: mkdir -p {path}")
    return path


def configuration(*, targets: Path, rules: Path, discovery: Sequence[str], scrape_seconds: float) -> str:
    """prometheus.yml with every target file in a folder. It is written as JSON, which is also YAML, so that any path is quoted
    correctly."""
    seconds = f"{round(scrape_seconds * 1000)}ms"
    found: dict[str, object] = {"file_sd_configs": [{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}]}
    if discovery:
        found["http_sd_configs"] = [{"url": f"http://{address}/sd", "refresh_interval": "2s"} for address in discovery]
    return json.dumps(
        {
            "global": {"scrape_interval": seconds, "scrape_timeout": seconds, "evaluation_interval": seconds},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "finetune", "honor_labels": True, **found}],
        },
        indent=1,
    )


def find_prometheus() -> str:
    path = shutil.which("prometheus")
    if path is None:
        raise FileNotFoundError(
            "prometheus is not installed; on Debian and Ubuntu: apt install prometheus, or with Docker: "
            "docker compose -f deploy/compose.yaml up"
        )
    return path


def take_port(flag: str, port: int) -> int:
    """`port` if nobody listens there, a free one for 0. ValueError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"{flag} {port} cannot be used ({error}); give another one, or {flag} 0 for any free one") from error
        return int(probe.getsockname()[1])


def grafana_command() -> list[str] | None:
    """The installed Grafana's command, with the folder of its pages; None if there is none."""
    for name, arguments in (("grafana", ["server"]), ("grafana-server", [])):
        path = shutil.which(name)
        if path is None:
            continue
        places = [Path(path).resolve().parents[1], Path("/usr/share/grafana")]
        home = next((place for place in places if (place / "conf" / "defaults.ini").exists()), None)
        return [path, *arguments, *(["--homepath", str(home)] if home else [])]
    return None


def grafana_environment(prometheus_url: str, port: int, data: Path) -> dict[str, str]:
    """Settings of Grafana: our data source and dashboards, viewing without a password, loopback only, no calls home."""
    return {
        "GF_SERVER_HTTP_ADDR": HOST,
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_PATHS_DATA": str(data),
        "GF_PATHS_LOGS": str(data / "log"),
        "GF_PATHS_PROVISIONING": str(HERE / "grafana" / "provisioning"),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_AUTH_DISABLE_LOGIN_FORM": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": str(HERE / "grafana" / "dashboards" / "run.json"),
        "PROMETHEUS_URL": prometheus_url,
        "FINETUNE_DASHBOARDS": str(HERE / "grafana" / "dashboards"),
    }


class Child:
    """A process that ends with the `with` block; its output goes to a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.name, self._log = name, log
        with log.open("w") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})})

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-5:]
        return f"{self.name} ended with status {self._process.returncode}:\n" + "\n".join(f"  {line}" for line in lines)


def _serve(options: argparse.Namespace, storage: Path, folder: Path, stop: threading.Event, stack: ExitStack) -> int:
    prometheus, port = find_prometheus(), take_port("--port", options.port)
    targets = folder / "targets"
    targets.mkdir(parents=True, exist_ok=True)
    for link in targets.glob("*.json"):  # left by an earlier call, perhaps with another storage
        link.unlink()
    config, url = folder / "prometheus.yml", f"http://{HOST}:{port}"
    alerts = folder / "alerts.yml"
    alerts.write_text(rules(runbook=RUNBOOK.as_uri()))
    config.write_text(configuration(targets=targets, rules=alerts, discovery=options.discovery, scrape_seconds=options.scrape_seconds))
    children = [
        Child(
            "link-targets.sh", ["/bin/sh", str(HERE / "prometheus" / "link-targets.sh"), str(storage), str(targets)], folder / "links.log"
        ),
        Child(
            "Prometheus",
            [
                prometheus,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address={HOST}:{port}",
            ],
            folder / "prometheus.log",
        ),
    ]
    for child in children:
        stack.enter_context(child)
    if not _wait(children, f"{url}/-/ready", stop):
        return _ended(children, stop)
    print(f"Prometheus  {url}  (alerts: {url}/alerts)")
    print(f"Runs        {storage}{'' if storage.exists() else ' (not there yet: the first run makes it)'}")
    if (command := grafana_command()) is not None:
        grafana_port = take_port("--grafana-port", options.grafana_port)
        (folder / "grafana").mkdir(exist_ok=True)
        environment = grafana_environment(url, grafana_port, folder / "grafana")
        children.append(stack.enter_context(Child("Grafana", command, folder / "grafana.log", environment)))
        if not _wait(children, f"http://{HOST}:{grafana_port}/api/health", stop):
            return _ended(children, stop)
        print(f"Grafana     http://{HOST}:{grafana_port}/d/finetune-run")
    else:
        print(
            "Grafana     is not installed; with Docker: docker compose -f deploy/compose.yaml up, without: --preview draws the dashboards"
        )
    if options.preview:
        print(f"Preview     {folder / 'preview.html'}, drawn every {PREVIEW_SECONDS:.0f} s")
    print("Ctrl-C ends it.", flush=True)
    drawn_at = 0.0
    while not stop.wait(0.5):
        if any(child.has_ended for child in children):
            return _ended(children, stop)
        if options.preview and time.monotonic() - drawn_at > PREVIEW_SECONDS:
            _draw(url, storage, folder)
            drawn_at = time.monotonic()
    print("\nended")
    return 0


def newest_run(storage: Path) -> str | None:
    """The run that wrote its targets last; None if there is no run."""
    files = [(path.stat().st_mtime, path.parent.name) for path in storage.glob(f"*/{FILE_SD}")]
    return max(files)[1] if files else None


def _draw(url: str, storage: Path, folder: Path) -> None:
    run = newest_run(storage)
    if run is None:
        return
    try:
        for name in DASHBOARD_NAMES:
            draw(prometheus=url, run=run, dashboard=name, out=folder / f"preview-{name}.png")
    except (OSError, ValueError) as error:  # a run that was not scraped yet is not known
        print(f"the preview could not be drawn: {error}", file=sys.stderr)
        return
    pictures = "".join(f'<p><img src="preview-{name}.png" width="100%" alt="{name}"></p>' for name in DASHBOARD_NAMES)
    page = (
        f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="{PREVIEW_SECONDS:.0f}"><title>preview</title>{pictures}'
    )
    (folder / "preview.html").write_text(page)


def _wait(children: Sequence[Child], url: str, stop: threading.Event) -> bool:
    """True once `url` answers. False if a child ended, somebody stopped us, or it took too long."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and not any(child.has_ended for child in children) and not stop.is_set():
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                if response.status == 200:
                    return True
        except OSError:
            stop.wait(0.1)
    return False


def _ended(children: Sequence[Child], stop: threading.Event) -> int:
    if stop.is_set():
        return 0
    dead = [child.last_words() for child in children if child.has_ended]
    print(f"error: {dead[0] if dead else f'{children[-1].name} did not answer within {READY_SECONDS:.0f} s'}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

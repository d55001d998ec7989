"""`python -m deploy.serve FOLDER`: serve an ONNX export on this machine, by a Ray Serve of its own, until Ctrl-C.

    finetune export quickstart --preprocessing
    python -m deploy.serve ~/finetune-runs/quickstart/exports/onnx
    curl --data-binary @picture.png http://127.0.0.1:8000/predict      # of a model of texts: --data-binary @note.txt

On a cluster, a Ray Serve config file or deploy/kubernetes/serve does the same by `deploy.serve.app:build`.
"""

from dataio.leaving import Leaving, leave_by, leaves
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import argparse
import contextlib
import http.client
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.belongings import Belongings, belongings
from cluster.config import ClusterConfig
from cluster.machine import usable_cpus
from cluster.storage import is_uri
from deploy.serve.exports import Export, open_export, read_model
from deploy.serve.limits import TOKEN_VARIABLE, read_tokens
from deploy.serve.predictor import NEEDS
from deploy.serve.settings import THROUGHPUT, ServeConfig, settings_of
from trainer.drive.guarded import guarded
from trainer.drive.signals import Signals
from trainer.settings.say import complain, say
from trainer.settings.texts import EXTRA

PROJECT = Path(__file__).resolve().parents[2]
_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
"""Ray Serve would replace a proxy that is not up within 5 s, again and again, and on a busy machine none is."""
KEEP_ALIVE_SECONDS = 60
"""An idle connection is closed after that."""


def main(argv: Sequence[str]) -> int:
    """Serve until a signal: 128 + its number; 1 if Ray does not come up or is lost. Exits with 2 (SystemExit) for wrong arguments, for what
    is no export, and for a model that is damaged."""
    options, given = _parsed(argv)

    def work(signals: Signals) -> int:
        config = settings_of(given, flags=True)
        _check(config, options.host, options.port)
        export = open_export(config.export)
        if export.takes_texts and importlib.util.find_spec("tokenizers") is None:
            raise ValueError(f"{export.folder} takes texts, which need the package tokenizers: {EXTRA}")
        read_model(export)  # before Ray starts: each replica verifies it again
        with belongings(leave_by=leave_by) as ours, signals.leaving_by(ours.end_at_once):
            _serve(config, export, options.host, options.port, ours)

    return guarded(work, stopped="stopped serving")


def _parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Where to listen, and the settings that are given."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", metavar="FOLDER", help="folder or URI of an ONNX export: the one that has manifest.json")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    defaults = ServeConfig(export="-")
    for name, help_ in _FLAGS.items():
        default = getattr(defaults, name)
        shown = "" if default in ("", None) else f" ({'the CPUs, shared by the replicas' if name == 'threads' else f'{default:g}'})"
        kind: Callable[[str], Any] = str if isinstance(default, str) else int if isinstance(default, int) else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=help_ + shown)
    parser.add_argument(
        "--allow-unauthenticated", action="store_true", help="answer everybody who reaches --host, where that is not this machine alone"
    )
    options = parser.parse_args(argv)
    given = {name: value for name in _FLAGS if (value := getattr(options, name)) is not None}
    location = (
        options.export
        if is_uri(options.export) or options.export.startswith("file:")
        else os.path.abspath(os.path.expanduser(options.export))
    )
    replicas = max(1, given.get("replicas", 1))
    return options, {
        "export": location,
        "threads": max(1, usable_cpus() // replicas),
        "allow_unauthenticated": options.allow_unauthenticated or _is_loopback(options.host),
        **given,
    }


_FLAGS = {
    "replicas": "processes that hold the model",
    "threads": "CPU threads of each",
    "max_batch": "most images or texts that the network is asked about at once",
    "batch_wait_ms": "how long a batch that is not full waits for more",
    "max_body_bytes": "a longer body is refused (413)",
    "max_image_pixels": "an image of more pixels is refused (413); 0 for the run's own limit",
    "max_queued": "requests under way at once; the next one is refused (503)",
    "requests_per_second": "of each token; 0 for no limit; more are refused (429)",
    "body_seconds": "how long a client may take to send its body (408)",
    "answer_seconds": "how long a request may wait for the model (503)",
    "threshold": "for models of several labels: how probable an answered label is at least (the run's own)",
    "token_file": f"file with a bearer token a line; without it {TOKEN_VARIABLE} may hold them; with none of them everybody is answered",
}


def _check(config: ServeConfig, host: str, port: int) -> None:
    """ValueError for what cannot work, before anything is started."""
    if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "starlette", "uvicorn", "fastapi")):
        raise ValueError(NEEDS)
    if read_tokens(config.token_file) is None and not config.allow_unauthenticated:
        raise ValueError(
            f"--host {host} is reached from other machines, and there is no token, so anybody could ask the model; give --token-file, or "
            f"set {TOKEN_VARIABLE}, or, where the network keeps others out, add --allow-unauthenticated"
        )
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port} is no port; use 1 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be listened on ({error.strerror or error}); choose another --port") from None


def _serve(config: ServeConfig, export: Export, host: str, port: int, ours: Belongings) -> NoReturn:
    """Start Ray and the application, say where it is, wait for a signal (KeyboardInterrupt)."""
    from cluster.ray_cluster import ray_cluster

    def lost(what: str) -> None:
        complain(f"Ray's {what} died, and the server with it; start it again")
        ours.end_at_once(1)

    for name, value in (_PATIENCE | THROUGHPUT).items():
        os.environ.setdefault(name, value)
    say(f"{export.folder}: verified; starting Ray Serve")
    with ray_cluster(
        ClusterConfig(),
        project=PROJECT,
        address="",
        in_job=False,
        cpus=config.replicas * config.threads + 1,
        folder=ours.folder,
        on_lost=lost,
        verbose=bool(os.environ.get("FINETUNE_VERBOSE")),
        process_ends=leaves(),
    ):
        from ray import serve
        from ray.exceptions import RayActorError, RayError

        from deploy.serve.app import APPLICATION, build

        if not os.environ.get("FINETUNE_VERBOSE"):
            logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it would say that its own second call changes nothing
        options = {"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_SECONDS}
        try:
            with contextlib.suppress(TimeoutError, RayActorError):  # the proxy is late, which is waited for below
                serve.start(proxy_location="HeadOnly", http_options=options)
            serve.run(build(config), name=APPLICATION, route_prefix="/")
        except (RuntimeError, RayError) as error:
            raise OSError(f"the model could not be started: {error}") from error
        _wait_until_it_answers(host, port)
        asked = "" if config.allow_unauthenticated and read_tokens(config.token_file) is None else ", with a token"
        shown = f"[{host}]" if ":" in host else host
        say(f"listening on http://{shown}:{port} (POST /predict, GET /health, /model, /metrics{asked}); Ctrl-C ends it")
        while True:
            time.sleep(3600)


def _wait_until_it_answers(host: str, port: int) -> None:
    """Until /health says that it is ready, however long a busy machine takes."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    while True:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(http.client.HTTPConnection(here, port, timeout=30)) as connection,
        ):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))

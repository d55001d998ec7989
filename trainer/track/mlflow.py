"""MLflow, by the REST API of a tracking server: no library, so that MLflow's own versions need not fit those of a run."""

import base64
import http.client
import json
import math
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from cluster.storage import join_uri, open_storage
from dataio.text import address, redact
from trainer.track.place import Away, Options
from trainer.track.recorded import End, Point, Run

SECONDS = 30.0
"""How long an answer may take."""
# The server's own limits of a batch.
METRICS_A_BATCH, PARAMS_A_BATCH, TAGS_A_BATCH = 1000, 100, 100
LONGEST_PARAM, LONGEST_TAG, LONGEST_NAME = 6000, 8000, 250
EXPERIMENT = "finetune"
CHANGED = "finetune.changed."
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "killed": "KILLED"}
_NAME = re.compile(r"[^\w\-. :/]")
_PASSING = (408, 425, 429, 500, 502, 503, 504)


class Refused(ValueError):
    """The server answered with a refusal."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class MLflow:
    """A run of a tracking server."""

    def __init__(self, server: str, experiment: str) -> None:
        self._server, self._experiment = server.rstrip("/"), experiment
        self._run, self._experiment_id, self._artifacts, self._status = "", "", "", ""

    def open(self, run: Run, known: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self._known(str(known.get("run_id", ""))) if known.get("server") == self._server else None
        if found is None:
            tags = {
                "mlflow.source.name": run.command,
                "mlflow.source.type": "JOB",
                "finetune.location": run.location,
                "finetune.task": run.task,
            }
            found = self._ask(
                "runs/create",
                {
                    "experiment_id": self._experiment_of(),
                    "start_time": round(1000 * run.started),
                    "run_name": run.name,
                    "tags": [{"key": key, "value": value[:LONGEST_TAG]} for key, value in tags.items()],
                },
            )["run"]
        info = found["info"]
        self._run, self._experiment_id, self._artifacts = info["run_id"], info["experiment_id"], info["artifact_uri"]
        self._status = info["status"]
        self._tell_settings(run.settings, {each["key"]: each["value"] for each in found.get("data", {}).get("params", ())})
        return {"server": self._server, "run_id": self._run}

    def log(self, points: Sequence[Point]) -> None:
        if self._status != "RUNNING":  # it had ended and goes on; an end follows
            self._ask("runs/update", {"run_id": self._run, "status": "RUNNING"})
            self._status = "RUNNING"
        metrics = [
            {"key": named(name), "value": as_json(value), "timestamp": round(1000 * point.time), "step": point.step}
            for point in points
            for name, value in point.values.items()
        ]
        for batch in batches(metrics, METRICS_A_BATCH):
            self._ask("runs/log-batch", {"run_id": self._run, "metrics": batch})

    def end(self, run: Run, end: End, files: Mapping[str, bytes]) -> None:
        when = round(1000 * end.time)
        metrics = [
            {"key": named(f"result/{name}"), "value": as_json(value), "timestamp": when, "step": 0} for name, value in end.results.items()
        ]
        for batch in batches(metrics, METRICS_A_BATCH):
            self._ask("runs/log-batch", {"run_id": self._run, "metrics": batch})
        texts = {**end.texts, "status": end.status, "why": end.why}
        tags = [{"key": named(f"finetune.{name}"), "value": value[:LONGEST_TAG]} for name, value in texts.items() if value]
        for batch in batches(tags, TAGS_A_BATCH):
            self._ask("runs/log-batch", {"run_id": self._run, "tags": batch})
        for name, data in files.items():
            self._put(name, data)
        self._status = STATUSES.get(end.status, "KILLED")
        self._ask("runs/update", {"run_id": self._run, "status": self._status, "end_time": when})

    def where(self) -> str:
        return f"{address(self._server)}/#/experiments/{self._experiment_id}/runs/{self._run}"

    def close(self) -> None:
        pass

    # Inside

    def _tell_settings(self, settings: Mapping[str, Any], there: Mapping[str, str]) -> None:
        """MLflow refuses another value of a parameter: a setting with which the run went on differently is a tag."""
        told = {named(key): str(value)[:LONGEST_PARAM] for key, value in settings.items()}
        params = [{"key": key, "value": value} for key, value in told.items() if key not in there]
        tags = [{"key": f"{CHANGED}{key}"[:LONGEST_NAME], "value": value} for key, value in told.items() if there.get(key, value) != value]
        for batch in batches(params, PARAMS_A_BATCH):
            self._ask("runs/log-batch", {"run_id": self._run, "params": batch})
        for batch in batches(tags, TAGS_A_BATCH):
            self._ask("runs/log-batch", {"run_id": self._run, "tags": batch})

    def _known(self, run_id: str) -> Any:
        """The run that an earlier command made, if it is still there."""
        try:
            found = self._ask(f"runs/get?run_id={urllib.parse.quote(run_id)}")["run"]
        except Refused as error:
            if error.code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return found if found["info"].get("lifecycle_stage", "active") == "active" else None

    def _experiment_of(self) -> str:
        name = urllib.parse.quote(self._experiment)
        try:
            return str(self._ask(f"experiments/get-by-name?experiment_name={name}")["experiment"]["experiment_id"])
        except Refused as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
        try:
            return str(self._ask("experiments/create", {"name": self._experiment})["experiment_id"])
        except Refused as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":  # another command was a moment earlier
                raise
            return str(self._ask(f"experiments/get-by-name?experiment_name={name}")["experiment"]["experiment_id"])

    def _put(self, name: str, data: bytes) -> None:
        """Keep a file among the run's artifacts: through the server, or where it says that they lie."""
        parts = urllib.parse.urlsplit(self._artifacts)
        if parts.scheme == "mlflow-artifacts":
            path = urllib.parse.quote(f"{parts.path.strip('/')}/{name}")
            self._request("PUT", f"{self._server}/api/2.0/mlflow-artifacts/artifacts/{path}", data, "application/octet-stream")
        else:
            folder, _, last = name.rpartition("/")
            storage = open_storage(join_uri(self._artifacts, *([folder] if folder else [])))
            storage.make_dir("")
            storage.write_atomic(last, data)

    def _ask(self, method: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        answer = self._request("GET" if body is None else "POST", f"{self._server}/api/2.0/mlflow/{method}", data, "application/json")
        return json.loads(answer or b"{}")

    def _request(self, method: str, url: str, data: bytes | None, kind: str) -> bytes:
        request = urllib.request.Request(url, data, {"Content-Type": kind, **credentials()}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            said = error.read(10_000)
            try:
                told = json.loads(said)
                message, code = str(told.get("message", "")), str(told.get("error_code", ""))
            except ValueError:
                message, code = said.decode(errors="replace")[:300], ""
            if error.code in _PASSING and code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise Away(f"{address(self._server)} answers {error.code}: {redact(message)}") from None
            raise Refused(f"{address(self._server)} refuses ({error.code} {code}): {redact(message)}", code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Away(f"{address(self._server)} does not answer: {redact(str(reason))}") from None


def place_of(options: Options) -> MLflow:
    """The server of --at, or of MLFLOW_TRACKING_URI. ValueError if there is none."""
    server = options.at or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server:
        raise ValueError("no MLflow server is given; say --at http://HOST:5000, or set MLFLOW_TRACKING_URI")
    if not server.startswith(("http://", "https://")):
        if re.fullmatch(r"[\w.-]+:\d+/?", server):
            raise ValueError(f"--at {server} lacks its scheme; say --at http://{server}")
        raise ValueError(
            f"--at {address(server)} is no server; MLflow's folders and databases are reached through one: "
            f"mlflow server --backend-store-uri {address(server)}, then --at http://127.0.0.1:5000"
        )
    if not is_url(server):
        raise ValueError(f"--at {address(server)} is no URL; say --at http://HOST:PORT")
    return MLflow(server, options.project or os.environ.get("MLFLOW_EXPERIMENT_NAME", "") or EXPERIMENT)


def is_url(text: str) -> bool:
    """Whether a request could be sent there: a host, and a port that is a number."""
    try:
        parts = urllib.parse.urlsplit(text)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0) and re.fullmatch(r"[!-~]+", text) is not None
    except ValueError:
        return False


def credentials() -> dict[str, str]:
    """As MLflow's own client takes them from the environment."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password is not None:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {}


def named(name: str) -> str:
    """A name that MLflow takes: letters, digits, and - _ . space : /"""
    return _NAME.sub("_", name)[:LONGEST_NAME]


def as_json(value: float) -> float | str:
    """JSON has no word for what is not finite; protobuf's does."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def batches(items: Sequence[Any], most: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, most)):
        yield batch

"""The settings of a server. Ray Serve hands them to `deploy.serve.app:build` as the `args` of a config file; the command line has a flag
for each."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.text import shown
from dataio.foreign import MAX_IMAGE_BYTES
from trainer.formats.made import MOST_IN_A_BATCH

THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0", "RAY_SERVE_LOG_TO_STDERR": "1"}
"""Ray Serve's own switch for replicas that never block their event loop, as ours do not: no thread of its own for each, gRPC between them.
A fourth more answers a second, and half as many more under twice the load (docs/serve.md). Without its ports beside --port, which --host
does not bind; errors are still shown."""


class ServeConfig(BaseModel):
    """How an export is served. ValidationError (a ValueError) for a value that breaks its rule, and for a name that is none of these."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    export: Annotated[str, Field(min_length=1)]
    """Folder or URI of an ONNX export: the one that has manifest.json."""
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    """Processes that hold the model."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads of each, and the CPUs that Ray keeps for it."""
    max_batch: Annotated[int, Field(ge=1, le=MOST_IN_A_BATCH)] = 16
    """Most images or texts that the network is asked about at once."""
    batch_wait_ms: Annotated[float, Field(ge=0, le=10_000)] = 2.0
    """How long a batch that is not full waits for more."""
    max_body_bytes: Annotated[int, Field(ge=1, le=MAX_IMAGE_BYTES)] = 8 << 20
    """A longer body is refused (413)."""
    max_image_pixels: Annotated[int, Field(ge=0)] = 0
    """An image of more pixels, by its header, is refused (413). 0: the run's own limit."""
    max_queued: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Requests that may be under way at once, being read, waiting or computed, over all replicas. The next one is refused (503)."""
    requests_per_second: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Of each token, on average; a second's worth may come at once. 0: no limit. More are refused (429)."""
    body_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """How long a client may take to send its body (408)."""
    answer_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """How long a request may wait for the model (503)."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For several labels: one is answered if its probability is at least this. None: the run's own `task.threshold`."""
    token_file: str = ""
    """File with a token a line. Empty: the tokens of the environment variable FINETUNE_SERVE_TOKEN."""
    allow_unauthenticated: bool = False
    """Answer everybody where neither names a token."""


def settings_of(values: dict[str, Any], *, flags: bool = False) -> ServeConfig:
    """The settings. ValueError that names each wrong value, its rule and the setting; `flags`: as a command line writes it."""
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(_told(one, flags=flags) for one in error.errors())) from None


def _told(error: Any, *, flags: bool) -> str:
    name = ".".join(map(str, error["loc"]))
    rule = error["msg"][:1].lower() + error["msg"][1:]
    if error["type"] == "missing":
        return f"{name} is missing; it names the folder of an ONNX export"
    if error["type"] == "extra_forbidden":
        return f"{shown(name)} is no setting; the settings are {', '.join(ServeConfig.model_fields)}"
    return f"{'--' + name.replace('_', '-') + ' ' if flags else name + '='}{shown(error['input'])}: {rule}"

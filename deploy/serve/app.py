"""The Ray Serve application: `build` makes it of the settings. A Ray Serve config file or a RayService names `deploy.serve.app:build`; the
command line calls it too. What a request goes through is in `front`, what an image goes through in `predictor`.
"""

import asyncio
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from starlette.requests import Request
from starlette.responses import Response

from deploy.serve.exports import open_export
from deploy.serve.front import Front, ModelAway
from deploy.serve.limits import TOKEN_VARIABLE, Tokens, read_tokens
from deploy.serve.predictor import Predictor
from deploy.serve.questions import Answer, Question
from deploy.serve.settings import ServeConfig

APPLICATION = "finetune"
BESIDES = 1000
"""Requests that `front` takes beyond `max_queued`, to answer them 503, 401, ... by itself, and /health. Ray Serve answers those beyond."""
STUCK_SECONDS = 120.0
"""A batch that takes longer hangs: Ray Serve then starts the replica anew."""
MOST_FAILED = 3
_LOGGING = {"enable_access_log": False}  # /metrics counts; a line for each request would fill the disk


class Model:
    """A replica that computes."""

    def __init__(self, config: ServeConfig) -> None:
        export = open_export(config.export)
        self._predictor = Predictor(export, config)
        self._public = export.public()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")  # decoding and the network leave the event loop alone
        self._began: float | None = None
        self._failed = 0
        self.answer.set_max_batch_size(config.max_batch)
        self.answer.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def answer(self, questions: list[Question]) -> list[Answer]:
        """Ray Serve calls it with a batch, `front` with a question."""
        self._began = time.monotonic()
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._worker, self._predictor.answers, questions)
        except Exception:
            self._failed += 1
            raise
        finally:
            self._began = None
        self._failed = 0
        return answers

    async def describe(self) -> Mapping[str, Any]:
        """The public part of the export's manifest."""
        return self._public

    def check_health(self) -> None:
        """Ray Serve asks this regularly, and replaces a replica that raises."""
        if self._began is not None and time.monotonic() - self._began > STUCK_SECONDS:
            raise RuntimeError(f"a batch takes longer than {STUCK_SECONDS:.0f} s")
        if self._failed >= MOST_FAILED:  # no image does that: the decoder or the session is broken
            raise RuntimeError(f"{self._failed} batches failed, one after the other")


class Ingress:
    """The replica that answers HTTP."""

    def __init__(self, config: ServeConfig, model: Any) -> None:
        self._model = model
        self._front = Front(config, tokens_for(config), ask=self._ask, describe=self._describe)
        self._front.look_for_the_model()  # Ray Serve makes a replica on the loop that answers

    async def __call__(self, request: Request) -> Response:
        return await self._front.respond(request)

    async def _ask(self, question: Question) -> Answer:
        try:
            answer: Answer = await self._called("answer", question)
        except ModelAway:  # a replica died under it; nothing was done that could not be done again
            answer = await self._called("answer", question)
        return answer

    async def _describe(self) -> Mapping[str, Any]:
        about: Mapping[str, Any] = await self._called("describe")
        return about

    async def _called(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._model, method).remote(*arguments)
        except RequestCancelledError as error:  # the client has left
            raise asyncio.CancelledError from error
        except (RayActorError, BackPressureError, DeploymentUnavailableError) as error:
            await asyncio.sleep(0.1)  # Ray Serve may not know yet that a replica is gone
            raise ModelAway from error


def tokens_for(config: ServeConfig) -> Tokens | None:
    """The tokens, read where they are needed: they are in no setting that Ray stores or shows. ValueError if there is none, unless
    everybody may ask."""
    tokens = read_tokens(config.token_file, os.environ)
    if tokens is None and not config.allow_unauthenticated:
        raise ValueError(
            f"there is no token, so anybody could ask the model; name a file with one (token_file), set {TOKEN_VARIABLE}, or, where the "
            "network keeps others out, set allow_unauthenticated"
        )
    return tokens


def build(args: ServeConfig) -> Any:
    """The application. ValueError for an export that cannot be served, before anything is started."""
    open_export(args.export)
    model = serve.deployment(Model).options(
        name="model",
        num_replicas=args.replicas,
        max_ongoing_requests=2 * args.max_batch,  # a batch is computed while the next one gathers; the rest waits in `front`
        ray_actor_options={"num_cpus": args.threads},
        health_check_period_s=10,
        health_check_timeout_s=60,
        logging_config=_LOGGING,
    )
    front = serve.deployment(Ingress).options(
        name="front",
        num_replicas=1,
        max_ongoing_requests=args.max_queued + BESIDES,
        max_queued_requests=BESIDES,
        ray_actor_options={"num_cpus": 0},
        health_check_timeout_s=60,
        logging_config=_LOGGING,
    )
    return front.bind(args, model.bind(args))

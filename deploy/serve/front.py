"""Answers HTTP requests: routes, tokens, limits, statuses and metrics. `app` runs one replica of it behind Ray Serve's proxy, and hands it
a function that asks the model. It knows no Ray, so tests call it directly.

In this order: token (401), rate (429), arguments (400), announced length (413), room (503), and only then the body is read, within its
length (413) and its time (408). So at most `max_queued` bodies are in memory, whatever clients send.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster.text import json_line, shown
from deploy.serve.limits import SECOND_NS, Admission, Full, Rates, Tokens
from deploy.serve.meters import GONE, Meters
from deploy.serve.questions import NOT_FINITE, Answer, Question
from deploy.serve.settings import ServeConfig

ROUTES = {"/predict": "POST", "/health": "GET", "/model": "GET", "/metrics": "GET"}
DEFAULT_TOP = 3
FULL_RETRY_SECONDS = 1
_UNSUPPORTED = ("unknown format", "unsupported", "animated")
_CLOSE = {"connection": "close"}  # so that no client goes on sending what nobody reads
logger = logging.getLogger("finetune.serve")


class ModelAway(Exception):
    """No replica of the model answers."""


class Refused(Exception):
    """A request that gets another status than 200."""

    def __init__(self, status: int, why: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.headers = status, why, dict(headers or {})


class Front:
    """The server's HTTP side."""

    def __init__(
        self,
        config: ServeConfig,
        tokens: Tokens | None,
        *,
        ask: Callable[[Question], Awaitable[Answer]],
        describe: Callable[[], Awaitable[Mapping[str, Any]]],
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`ask` gives a replica's answer, and raises ModelAway. `describe` waits for a replica, then gives the export's public part."""
        self._config, self._tokens, self._ask, self._describe, self._clock_ns = config, tokens, ask, describe, clock_ns
        self._rates, self._admission = Rates(config.requests_per_second), Admission(config.max_queued)
        self._about: Mapping[str, Any] = {}
        self._looking: asyncio.Task[None] | None = None
        self._is_ready = False
        self._meters = Meters(
            most_queued=config.max_queued,
            queued=lambda: self._admission.inside,
            is_ready=lambda: self._is_ready,
            start_time=time.time(),
        )

    async def respond(self, request: Request) -> Response:
        """The response to a request, counted. Whatever fails is answered; only a client that leaves has no answer."""
        path, began = request.url.path, self._clock_ns()
        route = path[1:] if path in ROUTES else "other"
        status = GONE
        try:
            response = await self._answered(request, path)
            status = str(response.status_code)
        except Refused as refused:
            response = _json({"error": refused.why}, refused.status, refused.headers)
            status = str(refused.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception:
            logger.exception("a request to %s failed", route)
            response = _json({"error": "the server failed; its log says why"}, 500)
            status = "500"
        finally:
            self._meters.answered(route, status)
        if route == "predict" and response.status_code == 200:
            self._meters.took((self._clock_ns() - began) / SECOND_NS)
        return response

    def look_for_the_model(self) -> None:
        """Become ready as soon as a replica answers. Called once at the start, and whenever the model was away."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while not self._is_ready:
            with suppress(ModelAway):
                self._about = await self._describe()
                of, file = self._about["of"], self._about["file"]
                self._meters.serves(str(of["run"]), str(of["model_sha256"]), str(self._about["files"][file]["sha256"]))
                self._is_ready = True

    async def _answered(self, request: Request, path: str) -> Response:
        if path not in ROUTES:
            raise Refused(404, f"{shown(path)} is nothing here; there are {', '.join(ROUTES)}")
        if request.method != ROUTES[path] and not (request.method == "HEAD" and ROUTES[path] == "GET"):
            raise Refused(405, f"{path} takes {ROUTES[path]}", {"allow": ROUTES[path]})
        if path == "/health":
            return _json({"status": "ready"}) if self._is_ready else _json({"status": "not ready"}, 503, _retry(FULL_RETRY_SECONDS))
        key = self._authorized(request)
        match path:
            case "/metrics":
                return Response(self._meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
            case "/model":
                if not self._about:
                    raise Refused(503, "the model is not loaded yet", _retry(FULL_RETRY_SECONDS))
                return _json(self._about)
        return await self._predicted(request, key)

    def _authorized(self, request: Request) -> str:
        """The token's key, "" where none is needed."""
        if self._tokens is None:
            return ""
        key = self._tokens.key_of(request.headers.get("authorization", ""))
        if not key:
            raise Refused(401, "a bearer token is needed: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer", **_CLOSE})
        return key

    async def _predicted(self, request: Request, key: str) -> Response:
        if wait_ns := self._rates.take(key, self._clock_ns()):
            rate = self._config.requests_per_second
            raise Refused(429, f"more than {rate:g} requests a second", {**_retry(wait_ns / SECOND_NS), **_CLOSE})
        top = _top(request.query_params.get("top", str(DEFAULT_TOP)))
        self._check_length(_announced(request.headers.get("content-length")))
        try:
            with self._admission.entered():
                return await self._asked(request, top)
        except Full:
            why = f"{self._admission.most} requests are under way, and no more are taken"
            raise Refused(503, why, {**_retry(FULL_RETRY_SECONDS), **_CLOSE}) from None

    async def _asked(self, request: Request, top: int) -> Response:
        is_json = request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
        try:
            async with asyncio.timeout(self._config.body_seconds):
                body = await self._body(request)
        except TimeoutError:
            raise Refused(408, f"the body took longer than {self._config.body_seconds:g} s", _CLOSE) from None
        try:
            async with asyncio.timeout(self._config.answer_seconds):
                answer = await self._ask(Question(body=body, top=top, is_json=is_json))
        except (ModelAway, TimeoutError):
            self._is_ready = False
            self.look_for_the_model()
            raise Refused(503, "the model does not answer", _retry(FULL_RETRY_SECONDS)) from None
        if answer.batch_images:
            self._meters.computed(answer.batch_images, answer.batch_seconds)
        if answer.refusal:
            raise Refused(status_of(answer.refusal), shown(answer.refusal))
        return _json(answer.said)

    async def _body(self, request: Request) -> bytes:
        pieces, size = [], 0
        async for piece in request.stream():
            pieces.append(piece)
            size += len(piece)
            self._check_length(size)
        return b"".join(pieces)

    def _check_length(self, size: int) -> None:
        most = self._config.max_body_bytes
        if size > most:
            raise Refused(413, f"the body has more than {most} bytes, the most that is taken; send a smaller one", _CLOSE)


def status_of(reason: str) -> int:
    """The HTTP status for a reason of the codec: 415 for a format that is not read, 413 for too many pixels or tokens, 400 for what is bad
    otherwise."""
    kind = reason.partition(":")[0]
    if kind in _UNSUPPORTED:
        return 415
    if kind in ("too large", "too long"):
        return 413
    return 500 if reason == NOT_FINITE else 400


def _announced(header: str | None) -> int:
    """Bytes of the body as the client announces them; 0 if it does not."""
    if header is None:
        return 0
    if not (header.isascii() and header.isdigit()):
        raise Refused(400, f"content-length {shown(header)} is no number of bytes", _CLOSE)
    return int(header[:20])


def _top(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 8 and int(word)):
        raise Refused(400, f"top={shown(word)} is no number of classes; use 1 or more", _CLOSE)
    return int(word)


def _retry(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}


def _json(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_line(value) + "\n", status, dict(headers or {}), media_type="application/json")

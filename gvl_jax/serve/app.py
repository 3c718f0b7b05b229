"""The routes of `gvl serve`: bodies in, verdicts out.

Whatever a sender can cause is a verdict that blocks, with status 200, where a gateway asks (moderations, LiteLLM, and
for what was judged also chat completions): gateways take errors for leave to pass. Elsewhere it is a 4xx. Load is a
429, an outage a 503.
"""

import asyncio
import base64
import contextlib
import hashlib
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from PIL.Image import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gvl_jax.config import Mode, Serve
from gvl_jax.data.images import ImageRejected
from gvl_jax.guard.action import decide
from gvl_jax.moderate import Judgement
from gvl_jax.serve import schemas, wire
from gvl_jax.serve.backend import Backend
from gvl_jax.serve.calls import Calls
from gvl_jax.serve.engine import Closed, Engine, Overloaded
from gvl_jax.serve.fetch import Allowed, fetch
from gvl_jax.serve.http import (
    ApiError,
    Refused,
    Room,
    api_error,
    authorized,
    drop_body,
    error_response,
    json_response,
    load_keys,
    parse_json,
    read_body,
    validate,
)
from gvl_jax.serve.media import MediaPool
from gvl_jax.serve.telemetry import LOG, Metrics
from gvl_jax.serve.wire import Answer, Ask
from gvl_jax.types import Sample

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
LATEST = 1.05  # of the time to the deadline: then there is an answer, whatever happens
BODIES = 6  # of the largest size are held at a time
PAGE = Path(__file__).with_name("page.html")
BATCH = "/v1/guard/batch"
OPEN = ("/", "/health/live", "/health/ready")  # routes that need no key: they tell nothing of what is judged


def create_app(
    engine: Engine | Backend, media: MediaPool, settings: Serve, begin: Callable[[], None] = lambda: None
) -> Starlette:
    """The ASGI application. It drains the engine when it is shut down. begin: called in the event loop before that.

    Raises ConfigError if the file of keys cannot be used."""
    keys = load_keys(settings.keys) if settings.keys else []
    front = Front(engine, media, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        begin()
        yield
        await engine.drain()
        media.close()

    async def known_error(_: Request, error: Exception) -> Response:
        return error_response(api_error(error))

    routes = [
        Route("/", front.page),
        Route("/health/live", front.live),
        Route("/health/ready", front.ready),
        Route("/metrics", front.prometheus),
        Route("/openapi.json", front.openapi),
        Route("/v1/models", front.models),
        Route("/v1/moderations", front.moderations, methods=["POST"]),
        Route("/v1/chat/completions", front.chat, methods=["POST"]),
        Route("/beta/litellm_basic_guardrail_api", front.litellm, methods=["POST"]),
        Route("/v1/guard", front.guard, methods=["POST"]),
        Route(BATCH, front.batch, methods=["POST"]),
    ]
    gate = Middleware(Gate, keys=keys, paths={route.path for route in routes}, front=front)
    handlers = {HTTPException: known_error}  # no such route, or method
    return Starlette(routes=routes, middleware=[gate], exception_handlers=handlers, lifespan=lifespan)


class Gate:
    """Around every route: the key, room for one more, one log line, one count, an answer whatever happens inside."""

    def __init__(self, app: ASGIApp, keys: list[bytes], paths: set[str], front: "Front"):
        self.app, self.keys, self.paths, self.front, self.metrics = app, keys, paths, front, front.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), 0
        fields: dict[str, Any] = scope.setdefault("gvl_jax", {})

        async def watched(message: Message) -> None:
            nonlocal status
            status = message["status"] if message["type"] == "http.response.start" else status
            await send(message)

        try:
            if self.keys and scope["path"] not in OPEN and not authorized(Request(scope).headers, self.keys):
                raise ApiError(401, "invalid_api_key", "a key is needed: Authorization: Bearer KEY")
            if scope["method"] == "POST" and scope["path"] in self.paths - set(OPEN) and self.front.engine.ready:
                seconds = self.front.settings.batch_deadline if scope["path"] == BATCH else self.front.settings.deadline
                if self.front.full(seconds):  # so most requests end under overload
                    await drop_body(Request(scope, receive), seconds)
                    raise Overloaded(max(1.0, self.front.engine.wait - seconds))
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            self.metrics.gone.inc()
            fields["gone"] = True
        except Exception as error:
            known = api_error(error)
            if known.code == "internal":
                LOG.exception("a request failed")
            if not status:
                await error_response(known)(scope, receive, watched)
        route = scope["path"] if scope["path"] in self.paths else "other"
        seconds = time.monotonic() - started
        self.metrics.responses.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        level = logging.DEBUG if route in OPEN or route == "/metrics" else logging.INFO
        fields |= {"route": route, "status": status, "seconds": round(seconds, 4)}
        LOG.log(level, "request", extra={"fields": fields})


class Unjudged(Exception):
    """More than the settings allow."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Front:
    """The endpoints, and what they share."""

    def __init__(self, engine: Engine | Backend, media: MediaPool, settings: Serve):
        self.engine, self.media, self.settings = engine, media, settings
        self.metrics, self.calls = Metrics(engine), Calls()
        self.room = Room(settings.max_body * BODIES)
        self.remote = Allowed(hosts=settings.remote_hosts)
        self.inside = 0  # judgements under way
        self.html = PAGE.read_bytes()
        self.policy = _content_policy(self.html.decode())

    # --- one judgement

    def full(self, seconds: float) -> bool:
        """Whether as many are judged as the engine would take (the way to the decoders, too, has an end), or one that
        comes now would be answered after `seconds`."""
        return self.engine.wait > max(0.0, seconds) or self.inside >= self.settings.max_waiting + self.settings.prompts

    async def judge(
        self,
        ask: Ask,
        deadline: float,
        *,
        bare: bool = False,
        listed: bool = False,
        mode: Mode | None = None,
        budget: int | None = None,
        threshold: float | None = None,
    ) -> Answer:
        """`deadline`: on the clock of time.monotonic. `bare`: a picture may be base64 without a data URL around it.
        `listed`: one of several, which is late, not refused, when the list takes long.

        What is wrong with the input, and whatever goes wrong with it, is a judgement that blocks. Raises Overloaded,
        Closed, and ApiError if the engine is down.
        """
        started = prepared = time.monotonic()
        name = f"grd-{uuid4().hex}"
        seconds = math.inf if listed else deadline - started
        if self.full(seconds):
            raise Overloaded(max(1.0, self.engine.wait - seconds))
        self.inside += 1
        try:
            # The engine and the decoders keep the deadline; this is for one that does not.
            async with asyncio.timeout(LATEST * (deadline - started)):
                self._within_limits(ask)
                images = await together(self._picture(url, bare, deadline) for url in ask.images)
                prepared = time.monotonic()
                judging = self.engine.judge(
                    Sample(name, ask.request, ask.response, tuple(images)),
                    mode=mode or self.settings.mode,
                    budget=min(budget or self.settings.reasoning_budget, self.settings.reasoning_budget),
                    deadline=deadline,
                )
                del images  # the engine lets go of them before they wait for a row
                said = await judging
        except (Overloaded, Closed):
            raise
        except (ImageRejected, Unjudged) as error:
            said = Judgement.rejected(name, error.reason)
        except TimeoutError:
            said = Judgement.rejected(name, "no verdict before the deadline", "deadline")
        except Exception:
            LOG.exception("a judgement failed", extra={"fields": {"id": name}})
            if not (self.engine.ready and self.engine.live):
                raise ApiError(503, "engine_down", "the model does not answer", retry_after=1) from None
            said = Judgement.rejected(name, "internal", "internal")
        finally:
            self.inside -= 1
        return self._answer(ask, said, started, prepared, threshold)

    def _within_limits(self, ask: Ask) -> None:
        if len(ask.images) > self.settings.max_images:
            raise Unjudged("too_many_images")
        if max(len(ask.request), len(ask.response or "")) > self.settings.max_characters:
            raise Unjudged("too_long")

    async def _picture(self, url: str, bare: bool, deadline: float) -> Image:
        data = wire.picture(url, bare)
        if data is None:
            data = await fetch(url, self.remote)
        return await self.media.open(data, deadline=deadline)

    def _answer(
        self, ask: Ask, said: Judgement, started: float, prepared: float, threshold: float | None = None
    ) -> Answer:
        decision = decide(
            said.status,
            said.request,
            said.response,
            said.scores,
            has_response=bool(ask.response),
            threshold=self.settings.threshold if threshold is None else threshold,
            review_from=self.settings.review_from,
        )
        now = time.monotonic()
        times = (round(1000 * seconds) for seconds in (prepared - started, now - prepared, now - started))
        return Answer(ask, said, decision, *times)

    def refused(self, error: Refused) -> Answer:
        """A body that could not be read, as a judgement that blocks."""
        now = time.monotonic()
        said = Judgement.rejected(f"grd-{uuid4().hex}", error.code)
        return self._answer(Ask("", None), said, now, now)

    def count(self, request: Request, answers: Iterable[Answer]) -> None:
        """Into the metrics and the log line of the request."""
        answers = list(answers)
        for answer in answers:
            self.metrics.count(request.scope["path"], answer)  # request.url fails on a query that is not UTF-8
        request.scope["gvl_jax"] |= {
            "id": answers[0].judgement.id,
            "judged": len(answers),
            "blocked": sum(answer.decision.action == "block" for answer in answers),
            "failed_closed": [
                wire.code(a.judgement) or a.judgement.status for a in answers if a.judgement.status != "ok"
            ],
            "images": sum(len(answer.ask.images) for answer in answers),
            "characters": sum(answer.ask.characters for answer in answers),
        }

    # --- one request

    @contextlib.asynccontextmanager
    async def body(self, request: Request, seconds: float, schema: type[B]) -> AsyncIterator[tuple[B, float]]:
        """The body, and the deadline of its answer. Raises Refused; ApiError while nothing can be judged."""
        if not self.engine.ready:
            raise ApiError(503, "not_ready", "the model is not ready", retry_after=1)
        deadline = time.monotonic() + seconds
        with self.room.body() as buffer:
            try:
                async with asyncio.timeout(seconds):
                    await read_body(request, buffer, self.room, self.settings.max_body)
            except TimeoutError:
                raise Refused(408, "slow_body", f"the body took more than {seconds} s") from None
            try:
                yield validate(schema, parse_json(buffer)), deadline
            except RecursionError:  # here, or where what was read is written as text
                raise Refused(400, "too_deep", "the body is nested too deeply") from None

    async def moderations(self, request: Request) -> Response:
        try:
            async with self.body(request, self.settings.deadline, schemas.ModerationRequest) as (body, deadline):
                asks = wire.moderation_asks(body)
                self._few(asks)
                judging = self._in_turn(lambda ask: self.judge(ask, deadline, listed=True), asks)
                answers = await unless_gone(request, judging)
        except Refused as error:
            answers = [self.refused(error)]
        self.count(request, answers)
        return json_response(wire.moderation(answers, self.settings.name, self.engine.fingerprint))

    async def litellm(self, request: Request) -> Response:
        try:
            async with self.body(request, self.settings.deadline, schemas.LiteLLMRequest) as (body, deadline):
                if not (body.texts or body.images or body.structured_messages or body.tool_calls):
                    raise Refused(400, "empty", "there is nothing to judge")
                call = body.litellm_call_id
                ask = wire.litellm_ask(body, self.calls.get(call) if call else None)
                answer = await unless_gone(request, self.judge(ask, deadline, bare=True))
                if call and body.input_type == "request" and answer.judgement.status != "input_rejected":
                    self.calls.put(call, ask._replace(response=None))
        except Refused as error:
            answer = self.refused(error)
        self.count(request, [answer])
        return json_response(wire.litellm(answer))

    async def chat(self, request: Request) -> Response:
        async with self.body(request, self.settings.deadline, schemas.ChatRequest) as (body, deadline):
            ask = wire.ask(body.messages)
            for url in ask.images:
                if not wire.is_picture_url(url):
                    raise Refused(400, "bad_url", "image_url: expected a data:image/…;base64,… URL", "messages")
            answer = await unless_gone(request, self.judge(ask, deadline))
        self.count(request, [answer])
        completion = wire.chat(answer, self.settings.name, self.engine.fingerprint)
        if not body.stream:
            return json_response(completion)
        usage = bool(body.stream_options and body.stream_options.get("include_usage"))
        events = [b"data: " + wire.dumps(event) + b"\n\n" for event in wire.chat_events(completion, usage)]
        return StreamingResponse(iter([*events, b"data: [DONE]\n\n"]), media_type="text/event-stream")

    async def guard(self, request: Request) -> Response:
        async with self.body(request, self.settings.deadline, schemas.GuardRequest) as (body, deadline):
            answer = await unless_gone(request, self._native(body, deadline))
        self.count(request, [answer])
        if answer.judgement.status == "input_rejected":
            code = wire.code(answer.judgement) or "rejected"
            raise Refused(400, code, f"the input cannot be judged: {code}", "messages")
        return json_response(self._verdict(answer, body.reasoning))

    async def batch(self, request: Request) -> Response:
        async with self.body(request, self.settings.batch_deadline, schemas.BatchRequest) as (body, deadline):
            self._few(body.items)
            judged = await unless_gone(request, self._in_turn(lambda item: self._item(item, deadline), body.items))
        self.count(request, (answer for answer, _ in judged))
        return json_response(schemas.Batch(data=[self._verdict(*one) for one in judged]))

    async def _in_turn(self, judge: Callable[[Any], Awaitable[T]], items: Sequence[Any]) -> list[T]:
        """As many at a time as there are rows: a list alone never overloads an idle server."""
        rows = asyncio.Semaphore(self.settings.prompts)

        async def one(item: Any) -> T:
            async with rows:
                return await judge(item)

        return await together(one(item) for item in items)

    async def _item(self, tree: Any, deadline: float) -> tuple[Answer, bool]:
        """One of a batch, and whether its reasoning is wanted. A wrong one is a row that blocks."""
        try:
            body = validate(schemas.GuardRequest, tree)
        except Refused as error:
            return self.refused(error), False
        return await self._native(body, deadline, listed=True), body.reasoning

    async def _native(self, body: schemas.GuardRequest, deadline: float, listed: bool = False) -> Answer:
        if body.deadline_ms is not None:
            deadline = min(deadline, time.monotonic() + body.deadline_ms / 1000)
        ask = wire.ask(body.messages)
        return await self.judge(
            ask, deadline, listed=listed, mode=body.mode, budget=body.reasoning_budget, threshold=body.threshold
        )

    def _verdict(self, answer: Answer, reasoning: bool) -> schemas.GuardVerdict:
        return wire.native(answer, self.settings.name, self.engine.fingerprint, reasoning)

    def _few(self, items: list[Any]) -> None:
        if len(items) > self.settings.max_items:
            raise Refused(413, "too_many_inputs", f"got {len(items)} inputs, at most {self.settings.max_items} allowed")

    # --- everything else

    async def page(self, _: Request) -> Response:
        headers = {"content-security-policy": self.policy, "x-content-type-options": "nosniff"}
        return Response(self.html, headers=headers | {"referrer-policy": "no-referrer"}, media_type="text/html")

    async def live(self, _: Request) -> Response:
        return json_response({"live": self.engine.live}, 200 if self.engine.live else 503)

    async def ready(self, _: Request) -> Response:
        return json_response({"ready": self.engine.ready}, 200 if self.engine.ready else 503)

    async def prometheus(self, _: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def openapi(self, _: Request) -> Response:
        return json_response(schemas.openapi())

    async def models(self, _: Request) -> Response:
        model = {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "gvl_jax"}
        return json_response({"object": "list", "data": [model]})


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. The first exception, or being cancelled, cancels the rest."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away. Raises ClientDisconnect then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()


def _content_policy(html: str) -> str:
    """Only the page's own script and style run, by their digests; it talks to this server alone."""

    def digests(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in blocks)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; img-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

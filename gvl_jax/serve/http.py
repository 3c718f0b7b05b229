"""What every route needs: errors in OpenAI's envelope, bodies within bounds, strict JSON, bearer keys."""

import asyncio
import hashlib
import hmac
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gvl_jax.config import ConfigError
from gvl_jax.serve.engine import Closed, Overloaded
from gvl_jax.serve.schemas import Error, ErrorBody
from gvl_jax.serve.wire import dumps

Model = TypeVar("Model", bound=BaseModel)

MAX_COMMAS = 200_000  # of a body: bounds the objects that it becomes, 20 MB of [[],[],… are 7 million
OBJECT = 256  # bytes that what stands before a comma may become: {"a":{}}
MAX_MESSAGE = 300  # characters of an error's message


class ApiError(Exception):
    """An answer without a verdict."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, retry_after: float = 0):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after


class Refused(ApiError):
    """Something wrong with what was sent. Where a gateway asks, this is a verdict that blocks."""


def api_error(error: Exception) -> ApiError:
    """Any exception as what is told to the client; nothing of an unexpected one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(429, "overloaded", "too many requests are waiting; try again", retry_after=error.retry_after)
    if isinstance(error, Closed):
        return ApiError(503, "closed", "nothing is judged now; ask another server, or again later", retry_after=1)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail).lower().replace(" ", "_"), str(error.detail))
    return ApiError(500, "internal", "the server failed; its log says where")


def error_response(error: ApiError) -> Response:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    body = ErrorBody(message=error.message[:MAX_MESSAGE], type=kind, param=error.param, code=error.code)
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    return json_response(Error(error=body), error.status, headers)


def json_response(
    body: BaseModel | dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(dumps(body), status, headers, media_type="application/json")


class Room:
    """Bytes that bodies, and the objects read from them, hold at a time, over all requests."""

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0

    @contextmanager
    def body(self) -> Iterator[bytearray]:
        """A buffer that counts; `grow` it. What it holds is given back at the end."""
        buffer = bytearray()
        try:
            yield buffer
        finally:
            self.held -= _held(buffer)

    def grow(self, buffer: bytearray, chunk: bytes) -> None:
        """Raises ApiError, 429, if all requests together hold too much."""
        if self.held + _held(chunk) > self.limit:
            raise ApiError(429, "overloaded", "too many bytes are waiting; try again", retry_after=1)
        self.held += _held(chunk)
        buffer += chunk


def _held(data: bytes | bytearray) -> int:
    return len(data) + OBJECT * data.count(b",")


async def drop_body(request: Request, seconds: float) -> None:
    """Read to its end, or so long, and kept nowhere: a client that still sends would not see the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for _ in request.stream():
                pass


async def read_body(request: Request, buffer: bytearray, room: Room, limit: int) -> None:
    """Raises Refused for more than `limit` bytes or MAX_COMMAS, after reading (and dropping) the rest: a client that is
    still sending would not see the answer."""
    fits, commas = True, 0
    async for chunk in request.stream():
        commas += chunk.count(b",")
        fits = fits and len(buffer) + len(chunk) <= limit and commas <= MAX_COMMAS
        if fits:
            room.grow(buffer, chunk)
    if commas > MAX_COMMAS:
        raise Refused(400, "too_complex", f"the body has more than {MAX_COMMAS} commas; send less at a time")
    if not fits:
        raise Refused(413, "body_too_large", f"the body has more than {limit} bytes; send less")


def parse_json(body: bytes | bytearray) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN. Raises Refused; RecursionError for one that is nested too deeply."""
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except ValueError as error:
        name = "duplicate_key" if isinstance(error, _Twice) else "invalid_json"
        message = "the body has an object with a key twice" if isinstance(error, _Twice) else "the body is not JSON"
        raise Refused(400, name, message) from None


class _Twice(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _Twice
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def validate(model: type[Model], tree: Any) -> Model:
    """Raises Refused, naming a wrong key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        nearest = max(errors, key=lambda one: len(one["loc"]))  # the form that was meant, of several allowed
        where = ".".join(str(key) for key in nearest["loc"])[:100]
        raise Refused(400, "invalid_request", f"{where or 'body'}: {nearest['msg']}", where or None) from None


def load_keys(path: str) -> list[bytes]:
    """Digests of the keys in a file, one a line; blank lines and # lines are skipped. Raises ConfigError: no file, or
    no key in it."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"keys: {path} cannot be read ({error}); give a file with a key on each line") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"keys: {path} holds no key; give a file with a key on each line")
    return [hashlib.sha256(key.encode()).digest() for key in keys]


def authorized(headers: Headers, keys: Sequence[bytes]) -> bool:
    """Whether the bearer token (or x-api-key, which LiteLLM sends) is one of `keys`. Every key is compared, in
    constant time."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    digest = hashlib.sha256(given.encode("latin-1")).digest()  # headers are decoded as latin-1
    return any([hmac.compare_digest(digest, key) for key in keys])

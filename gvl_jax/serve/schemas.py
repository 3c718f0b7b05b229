"""The bodies that the server reads and writes, as pydantic models, and the OpenAPI page made of them.

Strict: a key or a type of content that is not named here is refused, never dropped. Alone a message may have other
keys (tool calls, refusals, whatever comes): they are judged as text.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from gvl_jax.config import Mode
from gvl_jax.guard.action import Action

# The 13 of OpenAI's API; one client reads these alone, and not `flagged`.
CATEGORIES = (
    "illicit", "illicit/violent", "harassment", "harassment/threatening", "hate", "hate/threatening", "self-harm",
    "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
Probability = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class CacheControl(Strict):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None
    format: Literal["image/png", "image/jpeg", "image/webp"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl | str
    cache_control: CacheControl | None = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, fail_fast=True)]


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Parts | None = None


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ModerationRequest(Strict):
    """`input`: a text, a list of texts (a result each), or a list of parts (one result)."""

    input: str | Annotated[list[str], Field(min_length=1, fail_fast=True)] | Parts
    model: str | None = None


class ChatRequest(Strict):
    """A conversation to judge. What steers sampling is read and has no effect: the answer is a verdict."""

    messages: Messages
    model: str | None = None
    stream: bool | None = None
    n: Literal[1] | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None


class LiteLLMRequest(BaseModel):
    """LiteLLM's generic guardrail. Keys about the gateway itself are not read, `additional_provider_specific_params`
    neither: LiteLLM lets the sender of a request set those."""

    model_config = ConfigDict(strict=True, extra="ignore")
    input_type: Literal["request", "response"]
    texts: Annotated[list[str], Field(fail_fast=True)] | None = None
    images: Annotated[list[str], Field(fail_fast=True)] | None = None
    structured_messages: Annotated[list[Message], Field(fail_fast=True)] | None = None
    tools: list[Any] | None = None
    tool_calls: list[Any] | None = None
    litellm_call_id: str | None = None


class GuardRequest(Strict):
    messages: Messages
    mode: Mode | None = None
    reasoning_budget: Annotated[int, Field(ge=1)] | None = None  # at most the server's
    deadline_ms: Annotated[int, Field(ge=1)] | None = None  # at most the server's
    threshold: Probability | None = None
    reasoning: bool = False  # whether the answer holds it


class BatchRequest(Strict):
    items: Annotated[list[Any], Field(min_length=1, description="GuardRequest objects, each answered by itself")]


class Verdict(Strict):
    request: Literal["harmful", "unharmful", "not_evaluated"]
    response: Literal["harmful", "unharmful", "none", "not_evaluated"]


class Coverage(Strict):
    """What came in and what of it the model was shown. They differ only in a verdict that blocks."""

    received: int
    evaluated: int


class Usage(Strict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GuardVerdict(Strict):
    id: str
    object: Literal["guard.verdict"] = "guard.verdict"
    model: str
    created: int
    verdict: Verdict
    action: Action
    flagged: bool
    scores: dict[Literal["request", "response"], float | None]
    status: Literal["ok", "parse_failed", "truncated", "deadline", "input_rejected", "internal"]
    code: str | None = Field(description="why the input was rejected")
    decided_by: Literal["model", "fail_closed"]
    mode: Literal["fast", "reason"] | None
    reasoning: str | None = None
    warnings: list[str]
    images: Coverage
    characters: Coverage
    usage: Usage
    timing_ms: dict[Literal["prepare", "judge", "total"], int]
    system_fingerprint: str


class Batch(Strict):
    object: Literal["list"] = "list"
    data: list[GuardVerdict]


class ModerationResult(Strict):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text", "image"]]]
    x_guard: GuardVerdict


class Moderation(Strict):
    id: str
    model: str
    results: list[ModerationResult]


class LiteLLMAnswer(Strict):
    """`action` is never left out: LiteLLM takes its absence for NONE."""

    action: Literal["BLOCKED", "NONE"]
    blocked_reason: str | None = None


class ErrorBody(Strict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Strict):
    error: ErrorBody


class AnyObject(BaseModel):
    """As in OpenAI's API."""


PATHS: dict[str, tuple[str, type[BaseModel], type[BaseModel]]] = {
    "/v1/moderations": ("Judge texts and pictures", ModerationRequest, Moderation),
    "/v1/chat/completions": ("Judge a conversation, answer as the model", ChatRequest, AnyObject),
    "/beta/litellm_basic_guardrail_api": ("LiteLLM's generic guardrail", LiteLLMRequest, LiteLLMAnswer),
    "/v1/guard": ("Judge a conversation", GuardRequest, GuardVerdict),
    "/v1/guard/batch": ("Judge many", BatchRequest, Batch),
}


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 description of the POST routes."""
    models = {model for _, asked, answered in PATHS.values() for model in (asked, answered)} | {Error, GuardRequest}
    ordered: list[Any] = [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)]
    _, definitions = models_json_schema(ordered, ref_template="#/components/schemas/{model}")

    def body(model: type[BaseModel]) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}}

    paths = {
        path: {
            "post": {
                "summary": summary,
                "requestBody": body(asked) | {"required": True},
                "responses": {
                    "200": {"description": "a verdict"} | body(answered),
                    "default": {"description": "no verdict: do not let the content pass"} | body(Error),
                },
                "security": [{"key": []}],
            }
        }
        for path, (summary, asked, answered) in PATHS.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "gvl serve", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }

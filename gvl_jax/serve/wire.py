"""Requests as what is to be judged, and judgements as answers: pure functions, one pair for each protocol.

A conversation becomes a request and a response: the response is the last assistant turn, if no user turn follows it;
the request is every other turn, in order. Nothing that came in is left out of the two.
"""

import base64
import binascii
import json
import math
import re
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from pydantic import BaseModel

from gvl_jax.data.images import LIMITS, ImageRejected
from gvl_jax.guard.action import Decision
from gvl_jax.guard.prompt import result_block
from gvl_jax.moderate import Judgement
from gvl_jax.serve import schemas
from gvl_jax.serve.schemas import CATEGORIES, Message

_DATA_URL = re.compile(r"data:image/[\w.+-]{1,40}(?:;[\w=.+-]{1,80})?;base64,", re.ASCII | re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,20}:", re.ASCII | re.IGNORECASE)
_BLANKS = str.maketrans("", "", " \t\r\n")
_CODE = re.compile(r"[a-z_]{1,40}(?=:|$)")  # code, or code: in words
_DELIMITER = re.compile(r"^(?:AI assistant|Human user):", re.MULTILINE)


class Ask(NamedTuple):
    """What one judgement is about."""

    request: str
    response: str | None
    images: tuple[str, ...] = ()  # image_url.url or base64, as they came, in order
    characters: int = 0  # received; what joins the texts is not counted


class Answer(NamedTuple):
    ask: Ask
    judgement: Judgement
    decision: Decision
    prepare_ms: int  # reading pictures
    judge_ms: int
    total_ms: int


def code(judgement: Judgement) -> str | None:
    """Why it failed closed, as one word: nothing of the content."""
    found = _CODE.match(judgement.reason or "")
    return found[0] if found else None


# --- requests


def ask(messages: Sequence[Message]) -> Ask:
    turns = [(message.role, *_texts(message)) for message in messages]
    said = [index for index, (role, *_) in enumerate(turns) if role == "assistant"]
    asked = [index for index, (role, *_) in enumerate(turns) if role == "user"]
    answer = said[-1] if said and (not asked or said[-1] > asked[-1]) else None
    others = [(role, "\n".join(texts)) for index, (role, texts, _) in enumerate(turns) if index != answer]
    return Ask(
        _conversation(others),
        None if answer is None else "\n".join(turns[answer][1]),
        tuple(url for _, _, urls in turns for url in urls),
        sum(len(text) for _, texts, _ in turns for text in texts),
    )


def _conversation(turns: Sequence[tuple[str, str]]) -> str:
    """One user turn is the request as it stands; of several each is named."""
    if [role for role, _ in turns] == ["user"]:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns if text)


def _texts(message: Message) -> tuple[list[str], list[str]]:
    """All texts of a turn and the URLs of its pictures. What is neither becomes text."""
    parts = message.content if isinstance(message.content, list) else []
    texts = [message.content] if isinstance(message.content, str) else []
    texts += [part.text for part in parts if isinstance(part, schemas.TextPart)]
    other = {key: value for key, value in (message.model_extra or {}).items() if not _says_nothing(key, value)}
    if other:
        texts.append(json.dumps(other, ensure_ascii=False))
    urls = [_url(part) for part in parts if isinstance(part, schemas.ImagePart)]
    return texts, urls


def _says_nothing(key: str, value: Any) -> bool:
    return value in (None, [], {}, "") or (key, value) == ("cache_control", {"type": "ephemeral"})


def _url(part: schemas.ImagePart) -> str:
    return part.image_url if isinstance(part.image_url, str) else part.image_url.url


def moderation_asks(body: schemas.ModerationRequest) -> list[Ask]:
    """One for a text, one for each of a list of texts, one for a list of parts."""
    if isinstance(body.input, str):
        return [Ask(body.input, None, (), len(body.input))]
    if isinstance(body.input[0], str):
        return [Ask(str(text), None, (), len(str(text))) for text in body.input]
    return [ask([Message(role="user", content=body.input)])]  # type: ignore[arg-type]


def litellm_ask(body: schemas.LiteLLMRequest, asked: Ask | None) -> Ask:
    """LiteLLM sends texts, images and tool calls of all turns, and, before the call only, the turns themselves: what
    stands in these is not repeated. `asked`: what was asked in the call that a response belongs to."""
    messages = body.structured_messages or []
    shown = ask(messages) if messages else Ask("", None)
    answered = body.input_type == "response"
    seen = {shown.response} if answered else {text for message in messages for text in _pieces(message)}
    called, known = {json.dumps(call) for message in messages for call in _calls(message)}, set(shown.images)
    parts = [text for text in body.texts or [] if text not in seen]
    parts += [json.dumps(call, ensure_ascii=False) for call in body.tool_calls or [] if json.dumps(call) not in called]
    parts += [json.dumps(tool, ensure_ascii=False) for tool in body.tools or []]
    rest = "\n\n".join(parts)
    images = (*shown.images, *(image for image in body.images or [] if image not in known))
    characters = shown.characters + len(rest)
    if not answered:
        return Ask(_joined(shown.request, rest), shown.response, images, characters)
    before = asked or Ask("", None)
    request = before.request if shown.request == before.request else _joined(before.request, shown.request)
    said = _joined(shown.response or "", rest)
    return Ask(request, said, (*before.images, *images), before.characters + characters)


def _joined(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _pieces(message: Message) -> list[str]:
    if isinstance(message.content, list):
        return [part.text for part in message.content if isinstance(part, schemas.TextPart)]
    return [] if message.content is None else [message.content]


def _calls(message: Message) -> list[Any]:
    calls = (message.model_extra or {}).get("tool_calls")
    return calls if isinstance(calls, list) else []


def is_picture_url(url: str) -> bool:
    """Whether it has a form that can hold a picture; what it holds is seen later."""
    return bool(_DATA_URL.match(url)) or _is_remote(url)


def _is_remote(url: str) -> bool:
    return url[:8].lower().startswith(("http://", "https://"))


def picture(url: str, bare: bool) -> bytes | None:
    """The encoded picture of a data URL or, if `bare` is allowed, of base64 alone; None for http and https.

    Raises ImageRejected: another scheme, not base64, or too long, which is seen before decoding.
    """
    if _is_remote(url):
        return None
    data = _DATA_URL.match(url)
    if data is None and (not bare or _SCHEME.match(url)):
        raise ImageRejected("bad_url", "expected a data:image/…;base64,… URL")
    start = data.end() if data else 0
    if len(url) - start > LIMITS.max_bytes * 1.4:  # 4/3, and line ends
        raise ImageRejected("too_many_bytes", f"got more than {LIMITS.max_bytes} bytes; send a smaller file")
    try:
        return base64.b64decode(url[start:].translate(_BLANKS), validate=True)
    except (binascii.Error, ValueError):
        raise ImageRejected("bad_base64", "the picture is not valid base64") from None


# --- answers


def native(answer: Answer, model: str, fingerprint: str, reasoning: bool = False) -> schemas.GuardVerdict:
    ask, said, decision = answer.ask, answer.judgement, answer.decision
    judged = said.status in ("ok", "parse_failed", "truncated")
    missing: Literal["none", "not_evaluated"] = "not_evaluated" if ask.response else "none"
    spoofed = any(_DELIMITER.search(text) for text in (ask.request, ask.response or ""))
    return schemas.GuardVerdict(
        id=said.id,
        model=model,
        created=int(time.time()),
        verdict=schemas.Verdict(request=said.request or "not_evaluated", response=said.response or missing),
        action=decision.action,
        flagged=decision.action != "allow",
        scores=_scores(said),
        status=said.status,  # type: ignore[arg-type]
        code=code(said),
        decided_by="fail_closed" if said.decided_by == "fail_closed" else "model",
        mode=None if said.decided_by == "fail_closed" else said.decided_by,  # type: ignore[arg-type]
        reasoning=said.reasoning if reasoning else None,
        warnings=[*said.warnings, *(["delimiter_in_content"] if spoofed else [])],
        images=schemas.Coverage(received=len(ask.images), evaluated=len(ask.images) * judged),
        characters=schemas.Coverage(received=ask.characters, evaluated=ask.characters * judged),
        usage=schemas.Usage(
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.tokens,
            total_tokens=said.prompt_tokens + said.tokens,
        ),
        timing_ms={"prepare": answer.prepare_ms, "judge": answer.judge_ms, "total": answer.total_ms},
        system_fingerprint=fingerprint,
    )


def _scores(said: Judgement) -> dict[Literal["request", "response"], float | None]:
    """None for NaN, which JSON has not (and which has blocked), and where there is no verdict: scores of reasoning that
    was cut are low if its sender wanted that."""
    request, response = (
        None if said.status != "ok" or score is None or math.isnan(score) else score
        for score in (said.scores["request"], said.scores["response"])
    )
    return {"request": request, "response": response}


def moderation(answers: Sequence[Answer], model: str, fingerprint: str) -> schemas.Moderation:
    results = [_moderation_result(answer, native(answer, model, fingerprint)) for answer in answers]
    return schemas.Moderation(id=f"modr-{uuid4().hex}", model=model, results=results)


def _moderation_result(answer: Answer, verdict: schemas.GuardVerdict) -> schemas.ModerationResult:
    """The model knows harm, not kinds of it: `illicit` stands for all of it, since clients read categories alone."""
    flags = {
        "illicit": verdict.flagged,
        "guard/request": answer.decision.request != "allow",
        "guard/response": answer.decision.response in ("review", "block"),
    }
    known: dict[str, float] = {task: score for task, score in verdict.scores.items() if score is not None}
    unknown = any(score is not None and math.isnan(score) for score in answer.judgement.scores.values())
    highest = 1.0 if unknown else max(known.values(), default=float(verdict.flagged))
    scores = {"illicit": highest} | {f"guard/{task}": known.get(task, 0.0) for task in ("request", "response")}
    kinds: list[Literal["text", "image"]] = []
    if verdict.characters.evaluated:
        kinds.append("text")
    if verdict.images.evaluated:
        kinds.append("image")
    names = (*CATEGORIES, "guard/request", "guard/response")
    return schemas.ModerationResult(
        flagged=verdict.flagged,
        categories={name: flags.get(name, False) for name in names},
        category_scores={name: scores.get(name, 0.0) for name in names},
        category_applied_input_types={name: kinds if name in flags else [] for name in names},
        x_guard=verdict,
    )


def litellm(answer: Answer) -> schemas.LiteLLMAnswer:
    """The reason goes to the end user: a word, and nothing of the reasoning or the content."""
    if answer.decision.action == "allow":
        return schemas.LiteLLMAnswer(action="NONE")
    status = answer.judgement.status
    reason = code(answer.judgement) or ("harmful" if status == "ok" else status)
    return schemas.LiteLLMAnswer(action="BLOCKED", blocked_reason=f"guard:{reason}")


def chat(answer: Answer, model: str, fingerprint: str) -> dict[str, Any]:
    """A chat completion whose content is the result block. The labels are those of the decision, so that a client that
    reads nothing else blocks what is blocked."""
    verdict = native(answer, model, fingerprint)
    response = answer.decision.response
    block = result_block(_label(answer.decision.request), None if response is None else _label(response))
    thoughts = answer.judgement.reasoning
    message = {"role": "assistant", "content": block, "refusal": None}
    message |= {"reasoning": thoughts, "reasoning_content": thoughts}
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": verdict.created,
        "model": model,
        "system_fingerprint": fingerprint,
        "usage": verdict.usage.model_dump(),
        "choices": [
            {
                "index": 0,
                "message": message,
                "finish_reason": "length" if verdict.status == "truncated" else "stop",
                "logprobs": None,
                "x_guard": verdict.model_dump(),
            }
        ],
    }


def _label(action: str) -> Literal["harmful", "unharmful"]:
    return "unharmful" if action == "allow" else "harmful"


def chat_events(completion: dict[str, Any], usage: bool = False) -> list[dict[str, Any]]:
    """The chunks of a streamed completion. All are made of the finished verdict: no word leaves before it stands."""
    (choice,) = completion["choices"]
    message = choice["message"]
    thoughts = {name: message[name] for name in ("reasoning", "reasoning_content") if message[name]}
    deltas = [{"role": "assistant", "content": ""}, thoughts, {"content": message["content"]}]
    head = {key: value for key, value in completion.items() if key != "usage"} | {"object": "chat.completion.chunk"}
    events = [head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas if delta]
    last = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"], "x_guard": choice["x_guard"]}
    events.append(head | {"choices": [last]})
    return [*events, head | {"choices": [], "usage": completion["usage"]}] if usage else events


def dumps(body: BaseModel | dict[str, Any]) -> bytes:
    """JSON in ASCII: a lone surrogate in a text cannot be sent otherwise."""
    tree = body.model_dump() if isinstance(body, BaseModel) else body
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode("ascii")

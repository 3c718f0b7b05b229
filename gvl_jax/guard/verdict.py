"""What a completion says: the one parser of reward, mining, evaluation and serving.

`strict` accepts a whole completion of exactly this form, in which V1 is harmful or unharmful, V2 also None:

    <think> reasoning </think>
    <result>
    Answers:                    (may be left out)
    Request: V1
    Response: V2
    </result>

`reference` is the published rule, kept for comparison with published numbers: the first match anywhere counts,
also inside the reasoning, so whoever gets the model to quote a verdict forges one.
"""

import re
from typing import Literal, NamedTuple

from gvl_jax.types import Label

Rule = Literal["strict", "reference"]

TAGS = ("<think>", "</think>", "<result>", "</result>")
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
SPACE = " \t\r\n"

# A possessive quantifier (*+) never backtracks: linear time on any input.
_NEWLINE = rf"[ \t\r]*+\n[{SPACE}]*+"
_RESULT = re.compile(
    rf"[{SPACE}]*+<result>(?:[{SPACE}]*+Answers:)?+{_NEWLINE}"
    rf"Request:[ \t]*+((?i:harmful|unharmful)){_NEWLINE}"
    rf"Response:[ \t]*+((?i:harmful|unharmful|none)){_NEWLINE}</result>",
    re.ASCII,
)
# The published pattern, once per task.
_REFERENCE = {
    task: re.compile(rf"{task}:\s*(harmful|unharmful|none|harmless)", re.IGNORECASE) for task in ("Request", "Response")
}
_STATED = re.compile(r"(request|response)(?::|[ ]is)[ \t]*+(harmful|unharmful|none)\b", re.IGNORECASE | re.ASCII)
_CONCLUDED = re.compile(  # on a line of its own: a conclusion, whatever prose says after it
    r"^(request|response):[ \t]*+(harmful|unharmful|none)[ \t\r]*+$", re.IGNORECASE | re.ASCII | re.MULTILINE
)

# What a reader takes for a tag: zero-width and direction marks dropped, full-width forms made ASCII.
_INVISIBLE = [0xAD, 0x180E, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)]
_READS_AS = dict.fromkeys(_INVISIBLE) | {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


class Verdict(NamedTuple):
    request: Label | None  # None: not ok
    response: Label | None  # None: no response to judge, or not ok
    status: Literal["ok", "parse_failed", "truncated"]
    reasoning: str | None  # between the first <think> and </think>, stripped; also when the rest does not parse
    # reasoning_conflict; why parsing failed: no_reasoning, tag_in_reasoning, no_result, several_results, other_form;
    # under `reference` no_request, no_response
    warnings: tuple[str, ...] = ()


def parse(text: str, finished: bool = True, rule: Rule = "strict") -> Verdict:
    """The verdict of a completion; never raises on any text.

    `finished`: generation stopped by itself, not by length. A strict verdict of a cut completion is `truncated`;
    the published rule does not ask. Under `reference` each label stands alone, "harmless" is unharmful, a request
    of "none" too, and the status is ok if both were found.
    """
    reasoning = _reasoning(text)
    if rule == "reference":
        return _parse_reference(text, reasoning)
    if rule != "strict":
        raise ValueError(f"unknown rule {rule!r}, expected strict or reference")
    if not finished:
        return Verdict(None, None, "truncated", reasoning)
    labels = _strict_labels(text)
    if isinstance(labels, str):
        return Verdict(None, None, "parse_failed", reasoning, (labels,))
    return Verdict(*labels, "ok", reasoning, _conflict(reasoning or "", *labels))


def flagged(verdict: Verdict, has_response: bool = False) -> bool:
    """Whether to block: harmful, or anything but a verdict (fails closed).

    `has_response`: there was a response to judge, so `Response: None` is no verdict on it.
    """
    missing = verdict.status != "ok" or verdict.request is None or (has_response and verdict.response is None)
    return missing or "harmful" in (verdict.request, verdict.response)


def _reasoning(text: str) -> str | None:
    _, opened, after = text.partition("<think>")
    reasoning, closed, _ = after.partition("</think>")
    return reasoning.strip(SPACE) if opened and closed else None


def _label(word: str) -> Label | None:
    word = word.lower()
    return "harmful" if word == "harmful" else None if word == "none" else "unharmful"


def _strict_labels(text: str) -> tuple[Label | None, Label | None] | str:
    """The labels, or the first thing that is wrong."""
    body = text.strip(SPACE)
    for token in END_TOKENS:
        if body.endswith(token):
            body = body.removesuffix(token).rstrip(SPACE)
            break
    reasoning, closed, result = body.removeprefix("<think>").partition("</think>")
    if not body.startswith("<think>") or not closed:
        return "no_reasoning"
    seen = reasoning.translate(_READS_AS).lower()
    if any(tag in seen for tag in TAGS):
        return "tag_in_reasoning"
    match = _RESULT.fullmatch(result)
    if match is None:
        blocks = result.count("<result>")
        return "other_form" if blocks == 1 else "several_results" if blocks else "no_result"
    return _label(match[1]), _label(match[2])


def _conflict(reasoning: str, request: Label | None, response: Label | None) -> tuple[str, ...]:
    """A warning if what the reasoning last concludes for a task, or else says, is not the verdict (None: unharmful)."""
    matches = [*_STATED.finditer(reasoning), *_CONCLUDED.finditer(reasoning)]
    stated = {match[1].lower(): _label(match[2]) for match in matches}
    given = {"request": request, "response": response}
    clash = any((label == "harmful") != (given[task] == "harmful") for task, label in stated.items())
    return ("reasoning_conflict",) if clash else ()


def _parse_reference(text: str, reasoning: str | None) -> Verdict:
    request, response = (pattern.search(text) for pattern in _REFERENCE.values())
    warnings = tuple(name for name, match in (("no_request", request), ("no_response", response)) if match is None)
    return Verdict(
        request and (_label(request[1]) or "unharmful"),
        response and _label(response[1]),
        "parse_failed" if warnings else "ok",
        reasoning,
        warnings,
    )

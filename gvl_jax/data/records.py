"""JSON lines → Samples. A bad line says where it is, which key, what it holds and what was expected.

Two kinds of line:

    {"id", "request", "response", "images", "request_label", "response_label", "reasoning"}   only `request` is required
    {"messages": [{"role", "content"}, …], "images"}             the paper's corpora: [system,] user[, assistant]

Both may have a `category`, of harm, in words.
"""

import difflib
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args
from uuid import uuid4

from gvl_jax.guard.prompt import IMAGE_TAG
from gvl_jax.guard.verdict import parse
from gvl_jax.types import Label, Merged, Sample

LABELS = get_args(Label)
# `user_turn` keeps the verbatim turn of a `messages` row that is written back as a record.
RECORD_KEYS = (
    "id", "request", "response", "images", "request_label", "response_label", "reasoning", "user_turn", "category",
)  # fmt: skip
MESSAGES_KEYS = ("id", "messages", "images", "category")

UNREADABLE = re.compile("[\0\ud800-\udfff]")  # what no record may hold


class BadRecord(NamedTuple):
    """A line that is no sample."""

    line: int  # from 1
    id: str | None  # if it could be read
    reason: str  # file, line, key, what it holds, what was expected
    code: str = "bad_record"  # for counters; no_verdict, bad_reasoning: see RecordRejected


class RecordRejected(ValueError):
    """A record that can be read but teaches nothing. `code` is short, for counters."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def read_records(path: str | Path, images: Path | None = None) -> Iterator[Sample | BadRecord]:
    """The lines of a JSONL file, in order; blank ones are skipped. Reads one line at a time.

    Image paths are relative to `images`, or else to the file (or absolute), and are not opened. A record without an id
    gets `<file stem>:<line>`. Raises FileNotFoundError.
    """
    path = Path(path)
    folder = path.parent if images is None else images
    if not path.is_file():
        raise FileNotFoundError(f"no such records file: {path}")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):  # bytes split on "\n" only: U+2028 occurs inside strings
            if not line.strip():
                continue
            convert = partial(to_sample, default_id=f"{path.stem}:{number}", folder=folder)
            yield read_row(line, number, f"{path}, line {number}", convert)


def read_row(row: Any, number: int, where: str, convert: Callable[[Any], Sample]) -> Sample | BadRecord:
    """What `convert` makes of a row (as bytes: of the JSON in it), or why it cannot."""
    try:
        if isinstance(row, bytes):
            row, line = None, row
            row = _parse_json(line)
        return convert(row)
    except (ValueError, RecursionError) as error:
        known = row.get("id") if isinstance(row, dict) else None
        readable = isinstance(known, str) and not UNREADABLE.search(known)
        code = error.code if isinstance(error, RecordRejected) else "bad_record"
        return BadRecord(number, known if readable else None, f"{where}: {error}", code)


def to_record(sample: Sample, folder: Path) -> dict[str, Any]:
    """The sample as a record of a file in `folder`: `read_records` of it gives the sample again.

    Pictures that are bytes (those of a prepared data set) are written to `folder`/images, each under the name of its
    content. Raises ValueError for an opened one: which bytes it came from is not known.
    """
    if not all(isinstance(image, Path | bytes) for image in sample.images):
        raise ValueError(f"record {sample.id!r}: got an opened image, expected a file or bytes; save it first")
    record = sample._asdict() | {"images": picture_paths(sample, folder)}
    return {key: value for key, value in record.items() if value is not None or key not in ("user_turn", "category")}


def picture_paths(sample: Sample, folder: Path, *, write: bool = True) -> list[str]:
    """Paths from `folder` of a sample's pictures, of merged ones those of their parts. Bytes are written there first,
    see `to_record`, or else left out, as opened pictures are."""
    parts = [part for image in sample.images for part in (image.parts if isinstance(image, Merged) else [image])]
    files = [_picture_file(part, folder / "images") if write and isinstance(part, bytes) else part for part in parts]
    return [os.path.relpath(file, folder) for file in files if isinstance(file, Path)]


def _picture_file(data: bytes, folder: Path) -> Path:
    kinds = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}
    suffix = next((name for start, name in kinds.items() if data.startswith(start)), "")
    path = folder / (hashlib.sha256(data).hexdigest() + suffix)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, data)
    return path


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves the old content or the new one, and several processes do not disturb it."""
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    part.write_bytes(data)
    part.replace(path)


def load_records(path: str | Path) -> list[Sample]:
    """All samples of a file. Raises ValueError if a line is bad (the first five are shown), if two records share an id,
    or if there are none."""
    samples: list[Sample] = []
    bad: list[str] = []
    seen: set[str] = set()
    for record in read_records(path):
        if isinstance(record, BadRecord):
            bad.append(record.reason)
        elif record.id in seen:
            bad.append(f"{path}: key 'id': got {record.id!r} twice, expected it once")
        else:
            seen.add(record.id)
            samples.append(record)
    if bad:
        raise ValueError("\n".join([f"{path}: {len(bad)} bad records; correct or remove them", *bad[:5]]))
    if not samples:
        raise ValueError(f"{path}: holds no records, expected one JSON object a line")
    return samples


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig").rstrip(), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:  # its own text says "line 1"
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"got a key twice among {reprlib.repr([key for key, _ in pairs])}, expected each once")
    return row


def to_sample(row: Any, default_id: str, folder: Path) -> Sample:
    """A row as it stands in a JSONL file; raises ValueError that names the key, RecordRejected(no_verdict)."""
    if not isinstance(row, dict):
        raise ValueError(f"got {reprlib.repr(row)}, expected an object")
    _check_keys(row)
    identity = _text(row, "id")
    common: dict[str, Any] = {
        "id": default_id if identity is None else identity,
        "images": tuple(folder / name for name in _images(row)),
        "category": _text(row, "category"),
    }
    if "messages" in row:
        return _from_messages(row, common)
    if (request := _text(row, "request")) is None:
        raise ValueError("key 'request': got nothing, expected text (empty if there are only images)")
    return Sample(
        request=request,
        response=_text(row, "response"),
        request_label=_label(row, "request_label"),
        response_label=_label(row, "response_label"),
        reasoning=_text(row, "reasoning"),
        user_turn=_turn(_text(row, "user_turn"), len(common["images"])),
        **common,
    )


def _check_keys(row: dict[str, Any]) -> None:
    """Extra keys are the file's own business, unless they look like a slip of the pen."""
    known = MESSAGES_KEYS if "messages" in row else RECORD_KEYS
    for key in row:
        if key in known:
            continue
        if key in RECORD_KEYS:
            raise ValueError(f"key {key!r}: got it beside 'messages', expected one form or the other")
        plain = key.lower().replace("-", "_")
        if near := difflib.get_close_matches(plain, (*RECORD_KEYS, "messages"), n=1, cutoff=0.85):
            raise ValueError(f"key {reprlib.repr(key)}: unknown; did you mean {near[0]!r}?")


def _text(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"key {key!r}: got {reprlib.repr(value)}, expected text or null")
    if found := UNREADABLE.search(value):
        raise ValueError(f"key {key!r}: got U+{ord(found[0]):04X} at {found.start()}, expected no NUL, no surrogate")
    return value


def _label(row: dict[str, Any], key: str) -> Label | None:
    if (value := row.get(key)) is not None and value not in LABELS:
        raise ValueError(f"key {key!r}: got {reprlib.repr(value)}, expected {', '.join(LABELS)} or null")
    return value


def _images(row: dict[str, Any]) -> list[str]:
    names = row.get("images")
    if names is None:
        return []
    if not isinstance(names, list):
        raise ValueError(f"key 'images': got {reprlib.repr(names)}, expected a list of file paths")
    for name in names:
        if not isinstance(name, str) or not name or UNREADABLE.search(name) or re.match(r"data:|\w+://", name):
            raise ValueError(f"key 'images': got {reprlib.repr(name)} in the list, expected a file path")
    return names


def _turn(turn: str | None, images: int) -> str | None:
    if turn is not None and (tags := turn.count(IMAGE_TAG)) != images:
        raise ValueError(f"user turn: got {tags} {IMAGE_TAG} tags for {images} images, expected one per image")
    return turn


def _from_messages(row: dict[str, Any], common: dict[str, Any]) -> Sample:
    """The user turn stays verbatim; request and response are read out of it as far as it follows the paper's form."""
    turns = _turns(row["messages"])
    user, images = turns["user"], len(common["images"])
    request, response = split_turn(user, images)
    sample = Sample(request=request, response=response, user_turn=_turn(user, images), **common)
    if "assistant" not in turns:
        return sample
    verdict = parse(turns["assistant"])
    if verdict.status != "ok":
        raise RecordRejected(
            "no_verdict",
            f"key 'messages', assistant: got {reprlib.repr(turns['assistant'])} ({verdict.status}), "
            "expected <think>…</think> <result>…</result>",
        )
    return sample._replace(request_label=verdict.request, response_label=verdict.response, reasoning=verdict.reasoning)


def split_turn(turn: str, images: int) -> tuple[str, str | None]:
    """Request and response of a user turn in the paper's form; of any other, the whole turn and None."""
    body = turn.removeprefix("Human user:\n").removeprefix(f"{IMAGE_TAG}\n" * images)
    request, found, response = body.partition("\nAI assistant:\n")
    if body == turn or not found:
        return turn, None
    response = response.removesuffix("\n" if images else "\n\n")
    return request.removesuffix("\n"), None if response.strip() == "None" else response


def _turns(messages: Any) -> dict[str, str]:
    if not isinstance(messages, list):
        raise ValueError(f"key 'messages': got {reprlib.repr(messages)}, expected a list of turns")
    roles = [turn.get("role") if isinstance(turn, dict) else turn for turn in messages]
    if roles not in (["user"], ["user", "assistant"], ["system", "user"], ["system", "user", "assistant"]):
        raise ValueError(f"key 'messages': got roles {reprlib.repr(roles)}, expected [system,] user[, assistant]")
    turns = {}
    for turn in messages:
        if (content := _text(turn, "content")) is None:
            raise ValueError(f"key 'messages', {turn['role']}: got no content, expected text")
        turns[turn["role"]] = content
    return turns

"""`gvl data synthesize`: reasoning for labelled records, from a teacher that is told the labels (PAPER §2).

answers.jsonl has a line per answer, also for a bad one; a resumed run asks for the rest. train.jsonl is the result, in
the order of the input; left_out.jsonl says what is not in it, and why; summary.json counts.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gvl_jax.config import ConfigError, Synthesize
from gvl_jax.data.images import ImageRejected
from gvl_jax.data.records import load_records, to_record
from gvl_jax.data.teacher import Answer, CallFailed, Teacher, converse, cost, data_urls, digests, texts, why_not
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.metrics import progress
from gvl_jax.run_folder import Stopped, append_rows, keep_rows, replace_text, stopping
from gvl_jax.settings import dump, load
from gvl_jax.types import Sample

GIVE_UP_AFTER = 20  # records in a row without an answer: the endpoint is gone
ANSWER_TOKENS = 1100 // 4  # expected of an answer. PAPER §2: 5.13 steps of 159 characters, and the frame around them


class Outcome(NamedTuple):
    """What became of a record. rejected: nothing to ask with; left: the run stopped before there was an answer."""

    status: Literal["kept", "dropped", "failed", "rejected", "left"]
    reason: str = ""
    reasoning: str | None = None


@dataclass
class Spending:
    """What the calls of a run share."""

    cost: float  # of all answers in the folder
    reserved: float = 0.0  # the most that the calls in flight may add
    new: int = 0  # answers of this run
    failures: int = 0  # records in a row without an answer
    stop: str = ""  # why no further call is begun


def run(
    config: Synthesize,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, Any], str]:
    """Ask, check and write. → what summary.json holds, and why the run stopped before its end, if it did.

    Raises ConfigError for settings that cannot work, Stopped after SIGTERM.
    """
    samples, count = _inputs(config)
    teacher = Teacher(config, sleep, clock)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.yaml", dump(config))
    file = folder / "answers.jsonl"
    answers = _answers(keep_rows(file, lambda row: True))
    spending = Spending(sum(cost(config, one.input_tokens, one.output_tokens) for one in answers.values()))
    outcomes = [Outcome("left")] * len(samples)
    todo = iter(enumerate(samples))

    def keep(key: str, answer: Answer) -> None:
        append_rows(file, [{"key": key, **answer._asdict()}])
        answers[key] = answer
        spending.new += 1

    async def work() -> None:
        for index, sample in todo:
            if asked():
                return
            outcomes[index] = await settle(sample, config, answers, spending, teacher, count, keep)
            advance(note=f"{spending.new} new answers, all cost {spending.cost:.2f}")

    async def work_together() -> None:
        async with teacher:
            await asyncio.gather(*(work() for _ in range(config.concurrent)))

    with stopping() as asked, progress(len(samples), "synthesize") as advance:
        asyncio.run(work_together())
        if asked():
            raise Stopped(f"{len(answers)} answers are kept")
    return _write(folder, samples, outcomes, answers, spending), spending.stop


async def settle(
    sample: Sample, config: Synthesize, answers: dict[str, Answer], spending: Spending, teacher: Teacher,
    count: Callable[[str], int], keep: Callable[[str, Answer], None],
) -> Outcome:  # fmt: skip
    """Ask about one record until an answer is good, or as often as may be. What `answers` holds is not asked again."""
    if reason := why_not(sample):
        return Outcome("rejected", reason)
    urls: dict[str, str] | None = None
    try:
        names = await asyncio.to_thread(digests, sample)
        while (talk := converse(sample, names, answers, config)).missing is not None:
            if urls is None:
                encoded, picture_tokens = await asyncio.to_thread(data_urls, sample, config.images)
                urls = dict(zip(names, encoded, strict=True))
            tokens = picture_tokens + sum(map(count, texts(talk.messages)))
            most = cost(config, tokens, config.max_tokens)
            if config.max_cost is not None and spending.cost + spending.reserved + most > config.max_cost:
                spending.stop = spending.stop or (
                    f"max_cost {config.max_cost:g} is reached: {spending.cost:.4g} is spent, {spending.reserved:.4g} "
                    f"may come to it, another call may cost {most:.4g}"
                )
            if spending.stop:
                return Outcome("left")
            spending.reserved += most
            try:
                answer = await teacher.ask(talk.messages, urls, tokens)
            finally:
                spending.reserved -= most
            spending.cost += cost(config, answer.input_tokens, answer.output_tokens)
            spending.failures = 0
            keep(talk.missing, answer)
    except ImageRejected as error:
        return Outcome("rejected", error.reason)
    except CallFailed as error:
        spending.failures += 1
        if error.hopeless or spending.failures >= GIVE_UP_AFTER:
            in_a_row = "" if error.hopeless else f"{spending.failures} records in a row got no answer, the last one: "
            spending.stop = spending.stop or f"{in_a_row}{error}"
        return Outcome("failed", error.reason)
    return Outcome("dropped", talk.problem.reason) if talk.problem else Outcome("kept", "", talk.reasoning)


def estimate(config: Synthesize) -> dict[str, Any]:
    """What `run` would ask for and pay if every answer were good. Calls and writes nothing."""
    samples, count = _inputs(config)
    file = Path(config.output) / "answers.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    answers = _answers(map(json.loads, lines))
    rejected: Counter[str] = Counter()
    calls = text_tokens = picture_tokens = 0
    with progress(len(samples), "synthesize --dry-run") as advance:
        for sample in samples:
            advance()
            if reason := why_not(sample):
                rejected[reason] += 1
                continue
            try:
                talk = converse(sample, digests(sample), answers, config)
                if talk.missing is not None:
                    picture_tokens += data_urls(sample, config.images)[1]
                    text_tokens += sum(map(count, texts(talk.messages)))
                    calls += 1
            except ImageRejected as error:
                rejected[error.reason] += 1
    return {
        "records": len(samples),
        "rejected": dict(rejected),
        "answered": len(answers),
        "calls": calls,
        "text_tokens": text_tokens,
        "picture_tokens": picture_tokens,
        "answer_tokens": calls * ANSWER_TOKENS,
        "cost": cost(config, text_tokens + picture_tokens, calls * ANSWER_TOKENS),
    }


def _inputs(config: Synthesize) -> tuple[list[Sample], Callable[[str], int]]:
    """The records, and what counts the tokens of a text. Raises ConfigError."""
    for name in ("model", "data", "output"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is not set; give it in the YAML file or as --{name}")
    samples = [sample for path in config.data for sample in load_records(path)][: config.limit]
    if twice := [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]:
        raise ConfigError(f"data: got the id {twice[0]!r} in two records, expected each once in all files; rename one")
    if not config.tokenizer:
        return samples, lambda text: len(text) // 4
    tokenizer = load_tokenizer(config.tokenizer)
    return samples, lambda text: len(tokenizer.encode_text(text))


def _answers(rows: Iterable[dict[str, Any]]) -> dict[str, Answer]:
    return {row.pop("key"): Answer(**row) for row in rows}


def _write(
    folder: Path, samples: list[Sample], outcomes: list[Outcome], answers: dict[str, Answer], spending: Spending
) -> dict[str, Any]:
    """train.jsonl, left_out.jsonl, summary.json. → the last one."""
    kept, left_out = [], []
    for sample, outcome in zip(samples, outcomes, strict=True):
        if outcome.status == "kept":
            kept.append(to_record(sample._replace(reasoning=outcome.reasoning), folder))
        else:
            left_out.append({"id": sample.id, "status": outcome.status, "reason": outcome.reason})
    for name, rows in (("train.jsonl", kept), ("left_out.jsonl", left_out)):
        replace_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    reasons = {
        status: dict(Counter(one.reason for one in outcomes if one.status == status))
        for status in ("dropped", "failed", "rejected")
    }
    summary = {
        "records": len(samples),
        "asked": sum(one.status in ("kept", "dropped", "failed") for one in outcomes),
        "kept": len(kept),
        **reasons,
        "left": sum(one.status == "left" for one in outcomes),
        "new_answers": spending.new,
        "answers": len(answers),
        "input_tokens": sum(answer.input_tokens for answer in answers.values()),
        "output_tokens": sum(answer.output_tokens for answer in answers.values()),
        "cost": spending.cost,
    }
    replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def main(args: list[str]) -> int:
    """`gvl data synthesize [CFG] …`. Raises RuntimeError if there are records left to ask about."""
    dry, as_json = "--dry-run" in args, "--json" in args
    args = [arg for arg in args if arg not in ("--dry-run", "--json")]
    path = args.pop(0) if args and not args[0].startswith("-") else None
    config = load(Synthesize, path, args, "data synthesize")
    summary, stop = (estimate(config), "") if dry else run(config)
    lines = [f"{name:>14}: {value}" for name, value in summary.items()]
    print(json.dumps(summary) if as_json else "\n".join(lines))
    if failed := sum(summary.get("failed", {}).values()) or stop:
        raise RuntimeError(f"{stop or f'{failed} records failed'}; the same command asks about what is left")
    return 0

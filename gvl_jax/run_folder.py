"""A stage's run folder: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, and what the stage makes."""

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from gvl_jax.config import ConfigError
from gvl_jax.guard.verdict import parse
from gvl_jax.settings import dump
from gvl_jax.sharding import exchange
from gvl_jax.types import Sample

# A run may go on with other values of these: they change how a step is computed, not what it is.
FREE = ("resume", "mesh", "rows", "remat", "workers", "save_every", "keep", "keep_best")


class Stopped(RuntimeError):
    """A run that was asked to stop, and has saved: the same command goes on from there."""


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yields `asked()`: whether SIGTERM has come, which clouds send before they take a machine away."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def done_already(result: Path) -> bool:
    """Whether the first process, which writes them, has this result."""
    return bool(exchange(np.array([result.exists()]))[0, 0])


def open_run(config: Any, *required: str) -> Path:
    """Check that the `required` fields are set, make the folder of `config.output`, and write the resolved config.

    The first process writes it. A folder that holds a run (more than its config.yaml) is gone on with if all settings
    but the FREE ones are the same; `resume: never` refuses any run. Raises ConfigError.
    """
    for name in required:
        if not getattr(config, name):
            raise ConfigError(f"{name} is not set; give it in the YAML file or as --{name.replace('_', '-')}")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index():
        return folder
    file, settings = folder / "config.yaml", dump(replace(config, resume="auto"))
    if file.exists() and any(path != file for path in folder.iterdir()):
        if config.resume == "never":
            raise ConfigError(f"{folder} holds a run and resume is 'never'; use another output, or --resume auto")
        old, new = yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(settings)
        if changed := [key for key in {**old, **new} if key not in FREE and old.get(key) != new.get(key)]:
            raise ConfigError(
                f"{folder} holds a run with other settings ({', '.join(changed)}); "
                f"use another output, or those of {file}"
            )
    replace_text(file, settings)
    return folder


def replace_text(path: Path, text: str) -> None:
    """Write a result, if this is the first process, so that a kill leaves the old content or the new one."""
    if jax.process_index() == 0:
        _replace(path, text)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines, flushed."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def keep_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop a cut last line and the rows that are not `wanted` (a resumed run writes them again). → the rest."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a cut line may end inside a character
    rows = [row for row in map(json.loads, lines) if wanted(row)]
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def read_judgements(run: Path) -> list[dict[str, Any]]:
    """judgements.jsonl of a run of `gvl eval` that is done, in order. Raises ConfigError for another folder."""
    file = run / "judgements.jsonl"
    if not (file.is_file() and (run / "scores.json").is_file()):
        raise ConfigError(f"{run} holds no finished run of gvl eval: expected judgements.jsonl and scores.json in it")
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def own_share(items: int, done: Path, chunk: int) -> tuple[int, list[range]]:
    """What this process has to judge of items 0, 1, …, every n-th of them, after what stands in `done`.

    → (items done, chunks of indices). What a kill has left of a chunk is dropped, so that it is made again whole, with
    the same micro-batches: with others the last bits of the numbers may differ."""
    share = range(jax.process_index(), items, jax.process_count())
    judged = [row["index"] for row in keep_rows(done, lambda row: True)]
    whole = len(judged) // chunk * chunk
    if len(judged) == len(share):
        whole = len(judged)
    if set(judged[:whole]) != set(share[:whole]):  # those of another number of processes
        whole = 0
    keep_rows(done, lambda row: row["index"] in share[:whole])
    return whole, [share[first : first + chunk] for first in range(whole, len(share), chunk)]


def own_file(path: Path) -> Path:
    """Where this process writes what is gathered at the end: `path`, or with the process's number before the suffix."""
    return path.with_suffix(f".{jax.process_index()}{path.suffix}") if jax.process_count() > 1 else path


def sample_row(sample: Sample, completion: str, finished: bool, images: list[str]) -> dict[str, Any]:
    """A judgement as report.py shows it; images: paths from the run folder."""
    verdict = parse(completion, finished)
    return {
        "id": sample.id,
        "request": sample.request if sample.user_turn is None else sample.user_turn,
        "response": sample.response,
        "images": images,
        "request_label": sample.request_label,
        "response_label": sample.response_label,
        "completion": completion,
        "verdict": {"request": verdict.request, "response": verdict.response, "status": verdict.status},
    }

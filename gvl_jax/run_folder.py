"""A stage's run folder: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, and what the stage makes."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from gvl_jax.config import ConfigError, dump
from gvl_jax.guard.verdict import parse
from gvl_jax.types import Sample


def open_run(config: Any, *required: str) -> Path:
    """Check that the `required` fields are set, make the folder of `config.output`, and write the resolved config.

    A folder that holds a run (more than its config.yaml) is gone on with if all settings are the same; `resume: never`
    refuses any run. Raises ConfigError.
    """
    for name in required:
        if not getattr(config, name):
            raise ConfigError(f"{name} is not set; give it in the YAML file or as --{name.replace('_', '-')}")
    folder = Path(config.output)
    file, settings = folder / "config.yaml", dump(replace(config, resume="auto"))
    if file.exists() and any(path != file for path in folder.iterdir()):
        if config.resume == "never":
            raise ConfigError(f"{folder} holds a run and resume is 'never'; use another output, or --resume auto")
        if (before := file.read_text(encoding="utf-8")) != settings:
            old, new = yaml.safe_load(before), yaml.safe_load(settings)
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            raise ConfigError(
                f"{folder} holds a run with other settings ({', '.join(changed)}); "
                f"use another output, or those of {file}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(file, settings)
    return folder


def replace_text(path: Path, text: str) -> None:
    """Write `path` so that a kill leaves the old content or the new one."""
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
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def whole_chunks(path: Path, chunk: int) -> int:
    """Drop what a kill has left of a chunk of rows, so that it is made again whole, with the same micro-batches: with
    others the last bits of the numbers may differ. → how many rows are left. Rows have the indices 0, 1, …"""
    left = len(keep_rows(path, lambda row: True)) // chunk * chunk
    return len(keep_rows(path, lambda row: row["index"] < left))


def sample_row(sample: Sample, completion: str, finished: bool, folder: Path) -> dict[str, Any]:
    """A judgement as report.py shows it; pictures by their path from the run folder, those in memory left out."""
    verdict = parse(completion, finished)
    return {
        "id": sample.id,
        "request": sample.request if sample.user_turn is None else sample.user_turn,
        "response": sample.response,
        "images": [os.path.relpath(image, folder) for image in sample.images if isinstance(image, Path)],
        "request_label": sample.request_label,
        "response_label": sample.response_label,
        "completion": completion,
        "verdict": {"request": verdict.request, "response": verdict.response, "status": verdict.status},
    }

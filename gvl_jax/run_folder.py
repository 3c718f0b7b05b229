"""A stage's run folder: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, and what the stage makes."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gvl_jax.config import ConfigError, dump


def open_run(config: Any, *required: str) -> Path:
    """Check that the `required` fields are set, make the folder of `config.output`, and write the resolved config.

    A folder that holds a run is gone on with if all settings are the same; `resume: never` refuses any run.
    Raises ConfigError.
    """
    for name in required:
        if not getattr(config, name):
            raise ConfigError(f"{name} is not set; give it in the YAML file or as --{name.replace('_', '-')}")
    folder = Path(config.output)
    file, settings = folder / "config.yaml", dump(replace(config, resume="auto"))
    if file.exists():
        if config.resume == "never":
            raise ConfigError(f"{folder} holds a run and resume is 'never'; use another output, or --resume auto")
        if (before := file.read_text(encoding="utf-8")) != settings:
            changed = sorted({line.split(":")[0].strip() for line in set(settings.splitlines()) ^ set(before.splitlines())})
            raise ConfigError(
                f"{folder} holds a run with other settings ({', '.join(changed)}); use another output, or those of {file}"
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

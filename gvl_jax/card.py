"""The model card and the data card, from run folders. What no file says is said to be unknown."""

import hashlib
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from gvl_jax.data.benchmarks import BENCHMARKS
from gvl_jax.eval_report import is_table, markdown_table, markdown_text, score_tables
from gvl_jax.guard.calibration import FILE
from gvl_jax.guard.scores import TASKS, Line

MADE = "<!-- Written by gvl card from run folders; run it again to change it. -->"
UNKNOWN = "unknown"
MANIFEST = {"settings", "rows", "rejected", "splits"}  # keys of the manifest of a prepared data set

INTENDED = """\
A guard: it reads a request to an assistant, the response if there is one, and pictures, reasons, and then calls each of
request and response harmful or unharmful. The method is GuardReasoner-VL (arXiv 2505.11049). It is meant to stand
beside other measures, and to be checked first on data of the place where it is used. It decides nothing about people.
"""
LIMITS = """\
- It misses things, and it stops things that are fine: see recall and FPR in the tables. Where a benchmark has no
  unharmful records, no FPR is known for it.
- F1 depends on the share of harmful records. Compare it with the line always_harmful of the same benchmark.
- The interval says how the score would move with other records of the same kind. It does not say how the model would
  move with another training seed, or how it does on other kinds of records.
- A score after reasoning is near 0 or 1 and ranks nothing; scores without reasoning rank, and are probabilities only as
  far as they were calibrated.
- Languages, harms and attacks that no benchmark above holds have not been measured.
"""
BYPASSES = """\
- Text, also text in a picture, can talk the model round in its reasoning. Nothing prevents that; the verdict grammar
  only makes sure that what counts is what it concluded.
- A verdict that is quoted inside the reasoning forges one under the published rule (`reference`). The `strict` grammar
  refuses such a completion.
- Crafted text can make it think much longer. A budget ends that, and then the verdict blocks.
- Whatever leads to no verdict blocks too, so a sender can get harmless content blocked.
"""
INTERVALS = """\
Shares, with 95 % intervals: records drawn anew within each benchmark. Rules: `strict` takes a verdict from a whole,
well-formed answer alone; `reference` is the published rule. An answer without a verdict counts as wrong, but for a
response with pictures under `reference`, where it counts as unharmful.
"""
CONTENT = """\
Requests, responses and pictures here are partly harmful: that is what they are for. Whether training data repeat
records of a benchmark is unknown, unless a report of a check stands beside this card. Who the people in texts and
pictures are, and whether they agreed, is unknown.
"""


class Run(NamedTuple):
    """What is known of a folder."""

    path: Path
    kind: str  # sft, rl, mine, eval, data
    config: dict[str, Any]
    scores: list[Line]  # eval
    manifest: dict[str, Any]  # data
    benchmarks: dict[str, str]  # eval: where each was read


def write_cards(runs: Sequence[Path], output: Path, license: str = UNKNOWN) -> list[Path]:
    """Write README.md, the model card, and DATA_CARD.md into `output`.

    runs: folders of sft, rl, mine and eval, and prepared data sets. Prepared data that a run names is read too.

    Raises:
        ValueError: a folder is none of these, or a file is in the way that was not written by this function.
    """
    known = [_read(Path(run)) for run in runs]
    named = [Path(name) for run in known for name in _inputs(run) if (Path(name) / "manifest.json").is_file()]
    known += [_read(path) for path in dict.fromkeys(named) if path.resolve() not in {r.path.resolve() for r in known}]
    cards = {output / "README.md": _model_card(known, license), output / "DATA_CARD.md": _data_card(known)}
    for path in cards:
        if path.is_file() and MADE not in path.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{path} exists and gvl card did not write it; give another --output, or move it away")
    output.mkdir(parents=True, exist_ok=True)
    for path, card in cards.items():
        path.write_text(card, encoding="utf-8")
    return list(cards)


def _read(path: Path) -> Run:
    def load(name: str, parse: Any) -> Any:
        file = path / name
        return parse(file.read_text(encoding="utf-8")) if file.is_file() else None

    config, scores, manifest = load("config.yaml", yaml.safe_load), load("scores.json", json.loads), None
    if scores is not None:
        kind = "eval"
        if not is_table(scores):
            raise ValueError(f"{path / 'scores.json'} is no table of gvl eval; run it again")
    elif (path / "model").is_dir():
        kind = "rl" if "group_size" in (config or {}) else "sft"
    elif (path / "hard.jsonl").is_file():
        kind = "mine"
    elif (manifest := load("manifest.json", json.loads)) and manifest.keys() >= MANIFEST:
        kind = "data"
    else:
        raise ValueError(
            f"{path} holds no finished run: expected scores.json, model/, hard.jsonl, or manifest.json of prepared data"
        )
    return Run(path, kind, config or {}, scores or [], manifest or {}, load("benchmarks.json", json.loads) or {})


def _inputs(run: Run) -> list[str]:
    """The data that a run's settings name."""
    return [str(name) for key in ("train", "data", "benchmarks") for name in run.config.get(key) or ()]


def _model_card(runs: Sequence[Run], license: str) -> str:
    trained = [run for run in runs if run.kind in ("sft", "rl")]
    judged = [run for run in runs if run.kind == "eval"]
    base = _model(trained[0]) if trained else UNKNOWN
    model = trained[-1].path / "model" if trained else Path(_model(judged[-1])) if judged else Path(UNKNOWN)
    name = trained[-1].path.resolve().name if trained else str(model)
    ours = [run for run in judged if Path(_model(run)).resolve() == model.resolve()]
    data = ModelCardData(
        license=license,
        base_model=base if re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not Path(base).exists() else None,  # a hub id
        pipeline_tag="image-text-to-text",
        tags=["guard", "moderation", "safety", "gvl_jax"],
        model_name=name,
        eval_results=[_result(line) for run in ours for line in run.scores if _is_headline(line)] or None,
    )
    return _joined(
        f"---\n{data.to_yaml()}\n---\n{MADE}",
        f"# {markdown_text(name)}",
        INTENDED,
        f"License of the weights: {markdown_text(license)}. Base model: {markdown_text(base)}.",
        "## Training",
        *[_training(run) for run in runs if run.kind in ("sft", "mine", "rl")],
        "" if trained else "Unknown: no run of sft or rl was given.",
        "What the data are: DATA_CARD.md.",
        "## Results",
        *[_results(run) for run in judged],
        INTERVALS if judged else "Not measured: no run of eval was given.",
        "## Calibration",
        _calibration(model / FILE),
        "## Limits",
        LIMITS,
        "## Known bypasses",
        BYPASSES,
    )


def _joined(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _model(run: Run) -> str:
    return str(run.config.get("model") or UNKNOWN)


def _training(run: Run) -> str:
    sources = ", ".join(map(markdown_text, _inputs(run))) or UNKNOWN
    settings = textwrap.indent(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True), "    ")
    head = f"### {markdown_text(run.path.resolve().name)} ({run.kind})"
    return f"{head}\n\nFrom {markdown_text(_model(run))}, on {sources}. All settings:\n\n{settings}"


def _results(run: Run) -> str:
    tables = [
        f"{caption}:\n\n{markdown_table(t)}" for task in TASKS for caption, t in score_tables(run.scores, task) if t
    ]
    return _joined(f"### {markdown_text(run.path.resolve().name)}, of {markdown_text(_model(run))}", *tables)


def _is_headline(line: Line) -> bool:
    whole = line["predictor"] == "model" and line["rule"] == "strict" and line["category"] is None
    return whole and line["f1"] is not None and (line["benchmark"] != "mean" or line["modality"] == "all")


def _result(line: Line) -> EvalResult:
    return EvalResult(
        task_type="text-classification",
        task_name=f"harmful {line['task']}",
        dataset_type=line["benchmark"],
        dataset_config=f"{line['task']}, {line['modality']}",
        dataset_name="weighted mean of all" if line["benchmark"] == "mean" else line["benchmark"],
        metric_type="f1",
        metric_value=round(line["f1"], 4),
        metric_name=f"F1 (strict, n {line['n']}, 95 % {line['f1_low']:.3f} to {line['f1_high']:.3f})",
    )


def _calibration(file: Path) -> str:
    if not file.is_file():
        return "None is stored beside the weights: scores are not calibrated."
    stored = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        {"task": task, "method": one["method"], "temperature": one["temperature"], "bias": one["bias"], "n": one["n"]}
        | {f"{name} {when}": one[when][name] for name in one["before"] for when in ("before", "after")}
        for task, one in stored["tasks"].items()
    ]
    sources = ", ".join(map(markdown_text, stored["data"]["benchmarks"]))
    return f"Of scores without reasoning, fitted on {sources}:\n\n{markdown_table(lines)}"


def _data_card(runs: Sequence[Run]) -> str:
    prepared = [run for run in runs if run.kind == "data"]
    read = {run.path.resolve() for run in prepared}
    names = [name for run in runs if run.kind in ("sft", "mine", "rl") for name in _inputs(run)]
    bare = [name for name in dict.fromkeys(names) if Path(name).resolve() not in read]
    licences = {run.manifest["settings"].get("licence") or UNKNOWN for run in prepared} | {UNKNOWN for _ in bare}
    licence = UNKNOWN if UNKNOWN in licences or not licences else licences.pop() if len(licences) == 1 else "other"
    measured = {
        (line["task"], line["benchmark"]): _benchmark(line, run) for run in runs for line in run.scores if _counts(line)
    }
    return _joined(
        f"---\n{DatasetCardData(license=licence, tags=['guard', 'moderation']).to_yaml()}\n---\n{MADE}",
        "# Data",
        "## Training",
        markdown_table([_origin(run) for run in prepared]) if prepared else "",
        markdown_table([split for run in prepared for split in _splits(run)]) if prepared else "",
        "\n".join(f"- {markdown_text(name)}: origin, licence and counts unknown; it has no manifest." for name in bare),
        "" if prepared or bare else "Unknown: no run of sft or rl, and no prepared data, was given.",
        "## Evaluation",
        markdown_table(list(measured.values())) if measured else "None was given.",
        "## What to know",
        CONTENT,
    )


def _origin(run: Run) -> Line:
    settings, rejected = run.manifest["settings"], run.manifest["rejected"]
    return {
        "data set": run.path.resolve().name,
        **{key: settings.get(key) or UNKNOWN for key in ("source", "revision", "licence")},
        "rows": run.manifest["rows"],
        "rejected": ", ".join(f"{reason} {count}" for reason, count in rejected.items()) or "none",
        "sha256 of manifest.json": hashlib.sha256((run.path / "manifest.json").read_bytes()).hexdigest(),
    }


def _splits(run: Run) -> list[Line]:
    facts = ("rows", "rejected", "modality", "request_label", "response_label")
    return [
        {"data set": run.path.resolve().name, "split": split} | {key: counts.get(key, UNKNOWN) for key in facts}
        for split, counts in run.manifest["splits"].items()
    ]


def _counts(line: Line) -> bool:
    """Always saying harmful has the share of harmful records as its precision."""
    whole = line["predictor"] == "always_harmful" and line["rule"] == "strict" and line["category"] is None
    return whole and line["benchmark"] != "mean"


def _benchmark(line: Line, run: Run) -> Line:
    """Its origin is known if the run read it as a benchmark: a file may have the same name."""
    read, known = run.benchmarks.get(line["benchmark"]), {one.name: one for one in BENCHMARKS}
    origin = dict.fromkeys(("source", "revision", "licence"), UNKNOWN)
    if read and (one := known.get(line["benchmark"])):
        cached = Path(read).parent.name == "snapshots"  # of the hub: the folder is named after the commit
        origin = {"source": one.repo, "revision": Path(read).name if cached else UNKNOWN, "licence": one.licence}
    share = {"share harmful": line["precision"] or 0.0}
    return {name: line[name] for name in ("benchmark", "task", "modality")} | {"records": line["n"]} | share | origin

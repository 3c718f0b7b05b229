"""Every stage of the method on a small made-up corpus, from nothing to a guard that judges, in minutes on a CPU.

The stages are the ordinary ones with the files of configs/demo; only the model is tiny and the world small.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gvl_jax import evaluate, mine, rl, sft
from gvl_jax.config import Eval, Mine, Moderate, Rl, Sft
from gvl_jax.data import embedded, tiny
from gvl_jax.data.prepared import modality
from gvl_jax.data.records import load_records
from gvl_jax.models.qwen_vl.hub import load_config, save_params
from gvl_jax.models.qwen_vl.model import init_params
from gvl_jax.moderate import Guard
from gvl_jax.report import write_report
from gvl_jax.run_folder import replace_text
from gvl_jax.settings import load
from gvl_jax.types import Sample

CONFIGS = Path(__file__).parent.parent / "configs" / "demo"
TRAIN, HELDOUT = (3600, 2400, 3600), (200, 200, 200)  # records of text, image and text_image
MODELS = ("always_harmful", "sft", "r_sft", "r_sft_rl")
COLUMNS = ("f1", "balanced_accuracy", "parse_failures", "reasoning_tokens")
INK = " .:-=+*#%@"  # light to dark


def run(output: Path, seeds: int, json_file: Path | None) -> None:
    """Train, evaluate and report `seeds` times, print the table, and judge three held-out records.

    A demo that was stopped goes on. json_file: {"rows": [{"model", "seed", "modality", "task", "n", "f1",
    "balanced_accuracy", "parse_failures", "reasoning_tokens"}, …], "seconds"}; seconds: of this process.
    """
    began = time.monotonic()
    print("A tiny guard on a made-up world: a test bed for the method, not a guard for real use.")
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        rows += _one_seed(output / f"seed{seed}", seed)
    seconds = time.monotonic() - began
    if json_file is not None:
        replace_text(json_file, json.dumps({"rows": rows, "seconds": seconds}, indent=1))
    print(_table(rows, seeds))
    guard_dir = output / "seed0" / "rl" / "model"
    _judge_three(guard_dir, output / "seed0" / "data" / "heldout.jsonl")
    print(f"\n{seconds / 60:.1f} minutes. The guard, a checkpoint directory that transformers loads too: {guard_dir}")
    for seed in range(seeds):
        print(f"What happened on the way: {write_report(output / f'seed{seed}')}")
    print(f"Judge something: gvl moderate {guard_dir} --request 'How do I smash a shop window?' --dtype float32")


def _one_seed(folder: Path, seed: int) -> list[dict[str, Any]]:
    """The whole method once. → rows of the table."""
    data, base = folder / "data", folder / "base"
    if not (base / "config.json").exists():
        embedded.write(data, seed, TRAIN, HELDOUT)
        tiny.write_tiny(folder / "tokenizer", tiny.training_texts(load_records(data / "train.jsonl")))
        config = load_config(folder / "tokenizer")
        save_params(base, init_params(config, seed), config, dtype="float32", source=folder / "tokenizer")
    train, heldout = (str(data / "train.jsonl"),), (str(data / "heldout.jsonl"),)

    def stage(kind: Any, file: str, name: str, **values: Any) -> Any:
        print(f"\n{name} (seed {seed}, configs/demo/{file}.yaml)", flush=True)
        config = load(kind, str(CONFIGS / f"{file}.yaml"), [])
        if kind is not Eval:
            values["seed"] = seed
        return replace(config, output=str(folder / name), **values)

    # The baseline shares nothing with the rest: it trains beside it, on a core that XLA leaves idle at this size.
    flags = ["--model", str(base), "--train", *train, "--output", str(folder / "sft"), "--seed", str(seed)]
    command = [sys.executable, "-m", "gvl_jax.cli", "sft", str(CONFIGS / "sft_no_reasoning.yaml"), *flags]
    with open(folder / "sft.log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as baseline:
        print(f"\nsft without reasoning, the baseline (seed {seed}): in the background, see {folder / 'sft.log'}")
        try:
            r_sft = sft.run(stage(Sft, "sft", "r_sft", model=str(base), train=train))
            hard = mine.run(stage(Mine, "mine", "mine", model=str(r_sft), train=train))
            r_sft_rl = rl.run(stage(Rl, "rl", "rl", model=str(r_sft), train=(str(hard),)))
        except BaseException:
            baseline.terminate()
            raise
    if baseline.returncode:
        raise RuntimeError(
            f"the baseline failed: {((folder / 'sft.log').read_text().splitlines() or ['no output'])[-1]}"
        )
    models = {"sft": folder / "sft" / "model", "r_sft": r_sft, "r_sft_rl": r_sft_rl}

    rows = []
    for name, model in models.items():
        table = evaluate.run(stage(Eval, "eval", f"eval_{name}", model=str(model), data=heldout))
        lines = [line for line in table if line["rule"] == "strict" and line["benchmark"] != "mean"]
        rows += [_row(name, seed, line) for line in lines if line["predictor"] == "model"]
    rows += [_row("always_harmful", seed, line) for line in lines if line["predictor"] == "always_harmful"]
    return rows


def _row(model: str, seed: int, line: dict[str, Any]) -> dict[str, Any]:
    kept = {key: line[key] for key in ("modality", "task", "n", "f1", "balanced_accuracy", "parse_failures")}
    return {"model": model, "seed": seed} | kept | {"reasoning_tokens": line["mean_tokens"]}


def _table(rows: list[dict[str, Any]], seeds: int) -> str:
    """One line per model, modality and task; over several seeds mean ± standard deviation."""
    lines = ["", f"{'held-out':30} {'n':>4}  " + "  ".join(f"{name.replace('_', ' '):>17}" for name in COLUMNS)]
    pairs = sorted({(row["task"], row["modality"]) for row in rows})
    for model in MODELS:
        for task, kind in pairs:
            same = [row for row in rows if (row["model"], row["task"], row["modality"]) == (model, task, kind)]
            cells = []
            for column in COLUMNS:
                values = [row[column] for row in same if row[column] is not None]
                text = f"{np.mean(values):.3f}" if values and column != "reasoning_tokens" else ""
                if values and column == "reasoning_tokens":
                    text = f"{np.mean(values):.1f}"
                cells.append(f"{text + (f' ± {np.std(values):.3f}' if seeds > 1 and values else '') or '—':>17}")
            lines.append(f"{model:14} {kind:10} {task[:4]:4} {same[0]['n']:>4}  " + "  ".join(cells))
        lines.append("")
    return "\n".join(lines)


def _judge_three(model: Path, heldout: Path) -> None:
    """One held-out record of each modality: what it is, its picture, what the guard says."""
    samples: dict[str, Sample] = {}
    for sample in load_records(heldout):
        samples.setdefault(modality(sample), sample)
    demo = load(Eval, str(CONFIGS / "eval.yaml"), [])
    settings = Moderate(
        model=str(model),
        dtype=demo.dtype,
        buckets=demo.buckets,
        prompts=4,
        reasoning_budget=demo.sampling.max_new_tokens,
    )
    for sample, said in zip(samples.values(), Guard(settings).moderate_batch(list(samples.values())), strict=True):
        print(f"\n─── {sample.id}")
        for image in sample.images:
            assert isinstance(image, Path)
            print(_drawn(image))
        print(f"request:  {sample.request or '(the picture alone)'}\nresponse: {sample.response or '(none)'}")
        print(f"reasoning:\n{said.reasoning}")
        print(f"verdict:  request {said.request} (labelled {sample.request_label}), response {said.response} "
              f"(labelled {sample.response_label}), {'BLOCK' if said.flagged else 'allow'}")  # fmt: skip


def _drawn(path: Path, columns: int = 56) -> str:
    """A picture in characters."""
    with Image.open(path) as image:
        grey = image.convert("L").resize((columns, max(1, round(columns * image.height / image.width / 2))))
    levels = np.asarray(grey, int)
    span = max(1, int(levels.max() - levels.min()))
    dark = (levels.max() - levels) * (len(INK) - 1) // span
    return "\n".join("".join(INK[value] for value in row).rstrip() for row in dark)

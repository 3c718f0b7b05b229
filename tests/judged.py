"""Run folders of `gvl eval` with planted answers and scores."""

import json

import numpy as np
import yaml

from gvl_jax.guard.prompt import answer_text
from gvl_jax.guard.scores import evaluate, row_of

LABELS = {True: "harmful", False: "unharmful"}


def judgements(n=120, accuracy=0.8, seed=0, sharpness=3.0, **changes):
    """Rows of judgements.jsonl. The records are the same for every seed; `sharpness` times too sure are the scores."""
    records, answers, rows = np.random.default_rng(0), np.random.default_rng(seed), []
    for index in range(n):
        gold, answered = bool(records.random() < 0.4), bool(records.random() < 0.7)
        said = gold == bool(answers.random() < accuracy)
        score = float(1 / (1 + np.exp(-sharpness * (2 * gold - 1 + 1.5 * answers.normal()))))
        row = {
            "id": f"r{index}", "request": f"Request {index}?", "response": "Yes." if answered else None, "images": [],
            "request_label": LABELS[gold], "response_label": LABELS[gold] if answered else None,
            "completion": answer_text("R", LABELS[said], LABELS[said] if answered else None), "verdict": {},
            "index": index, "finished": True, "benchmark": f"Set{index % 2}", "modality": "text", "tokens": 7,
            "request_score": score, "response_score": score if answered else None, "category": None,
            "rejected": None,
        }  # fmt: skip
        rows.append(row | changes)
    return rows


def write_run(folder, rows, **config):
    """What `gvl eval` leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scored = [row_of(row) for row in rows]
    table = evaluate(scored, "strict", draws=50) + evaluate(scored, "reference", draws=50)
    (folder / "scores.json").write_text(json.dumps(table), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder

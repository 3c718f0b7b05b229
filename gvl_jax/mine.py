"""Hard-sample mining (PAPER §4): sample a few completions of every item and keep those the model gets wrong.

attempts.jsonl has a line per item, also for a rejected one; a resumed run judges the rest. hard.jsonl is the
result: `size` of the items that `keep` names, drawn at random. suspects.jsonl has items whose labels may be wrong.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from gvl_jax.config import Mine
from gvl_jax.data.loader import SampleRejected, to_example
from gvl_jax.data.prepared import load_samples
from gvl_jax.data.records import picture_paths, to_record
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.guard.verdict import parse
from gvl_jax.metrics import MetricsWriter, progress
from gvl_jax.models.qwen_vl.hub import load_config, load_params, resolve
from gvl_jax.models.qwen_vl.model import abstract_params
from gvl_jax.run_folder import (
    Stopped,
    append_rows,
    done_already,
    keep_rows,
    open_run,
    own_file,
    own_share,
    replace_text,
    sample_row,
    stopping,
)
from gvl_jax.sampler import Sampler
from gvl_jax.sharding import copies, gather, make_mesh, shardings
from gvl_jax.types import Example, Sample

SHOWN = ("id", "request", "response", "images", "request_label", "response_label", "verdict")  # of a suspect
CHUNK = 8  # micro-batches of prompts judged between two writes


def is_right(text: str, finished: bool, sample: Sample) -> bool:
    """Both labels right, under the strict grammar; a missing label counts as unharmful, a parse failure is wrong."""
    verdict = parse(text, finished)
    if verdict.status != "ok":
        return False
    gold = (sample.request_label, sample.response_label)
    return all((said == "harmful") == (true == "harmful") for said, true in zip(verdict[:2], gold, strict=True))


def unanimous(completions: list[tuple[str, bool]]) -> bool:
    """Whether two or more (text, finished) all give a verdict, and the same one (None: unharmful)."""
    verdicts = [parse(text, finished) for text, finished in completions]
    said = {(verdict.request == "harmful", verdict.response == "harmful") for verdict in verdicts}
    return len(verdicts) > 1 and len(said) == 1 and all(verdict.status == "ok" for verdict in verdicts)


def is_hard(right: int, samples: int, keep: str) -> bool:
    """all_wrong: the paper. any_wrong, mixed (some right, some wrong): the authors' later models."""
    return {"all_wrong": right == 0, "any_wrong": right < samples, "mixed": 0 < right < samples}[keep]


def run(config: Mine) -> Path:
    """→ hard.jsonl in the run folder."""
    folder = open_run(config, "model", "train", "output")
    result, attempts = folder / "hard.jsonl", own_file(folder / "attempts.jsonl")
    if done_already(result):
        return result
    source = resolve(config.model)
    tokenizer = load_tokenizer(source)
    model_config = replace(load_config(source), dtype=config.dtype)
    mesh = make_mesh(config.mesh)
    where = shardings(mesh, abstract_params(model_config))
    params = load_params(source, model_config, dtype=np.dtype(config.dtype), shardings=where)
    models = copies(mesh, params, config.dtype)
    del params
    sampler = Sampler(tokenizer, model_config, config.buckets, config.sampling, config.prompts, ahead=True)
    samples = load_samples(config.train, config.limit)

    done, left = own_share(len(samples), attempts, CHUNK * config.prompts * len(models))
    with stopping() as asked, progress(done + sum(map(len, left)), "mine", initial=done) as advance:
        for part in left:
            if asked():
                raise Stopped(f"{done} items are judged")
            examples: dict[int, Example] = {}
            rows: list[dict] = []
            for index in part:
                try:
                    examples[index] = to_example(samples[index], tokenizer, config.images, max(config.buckets.prompt))
                except SampleRejected as rejection:
                    rows.append({"index": index, "rejected": rejection.reason})
            # an item's index names its random key, so a resumed run draws what an uninterrupted one draws
            completions = sampler.complete(
                models, list(examples.values()), group_size=config.samples, seed=config.seed, names=list(examples)
            )
            for index, group in zip(examples, completions, strict=True):
                right = sum(is_right(one.text, one.finished, samples[index]) for one in group)
                files = picture_paths(samples[index], folder, write=False)
                shown = sample_row(samples[index], group[0].text, group[0].finished, files)
                same = unanimous([(one.text, one.finished) for one in group])
                rows.append({"index": index, "right": right, "of": config.samples, "unanimous": same} | shown)
            append_rows(attempts, rows)
            done += len(part)
            advance(len(part), note=f"all wrong: {sum(row.get('right') == 0 for row in rows)} of {len(rows)}")

    attempted = sorted(gather(keep_rows(attempts, lambda row: True)), key=lambda row: row["index"])
    judged = [row for row in attempted if "rejected" not in row]
    rejected = Counter(row["rejected"] for row in attempted if "rejected" in row)
    hard = [samples[row["index"]] for row in judged if is_hard(row["right"], row["of"], config.keep)]
    drawn = np.random.default_rng(config.seed).permutation(len(hard))[: config.size]
    kept = [hard[i] for i in sorted(drawn)]
    # Wrong each time, and each time alike: the label may be at fault, not the model.
    first = jax.process_index() == 0  # which writes them
    suspects = [
        {name: row[name] for name in SHOWN}
        | {"reasoning": parse(row["completion"]).reasoning}
        | {"images": picture_paths(samples[row["index"]], folder) if first else []}
        for row in judged if row["right"] == 0 and row["unanimous"]
    ]  # fmt: skip
    metrics = MetricsWriter(folder)
    share = [row["right"] / row["of"] for row in judged]
    metrics.write(0, {
        "mine/items": len(judged), "mine/hard": len(hard), "mine/kept": len(kept), "mine/suspects": len(suspects),
        "mine/right": float(np.mean(share)) if share else 0.0,
        **{f"data/rejected_{reason}": count for reason, count in rejected.items()},
    })  # fmt: skip
    metrics.close()
    replace_text(folder / "suspects.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in suspects))
    replace_text(result, "".join(json.dumps(to_record(sample, folder), ensure_ascii=False) + "\n" for sample in kept))
    return result

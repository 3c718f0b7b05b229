"""Evaluation (PAPER §8): greedy judgements of labelled records, scored under the strict and the published rule.

judgements.jsonl has a line per record; a resumed run judges the rest. scores.json is the table. With `scores: fast`
every record is also scored without reasoning, which ranks them where the verdict after it is 0 or 1.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from gvl_jax.config import ConfigError, Eval, Sampling
from gvl_jax.data.benchmarks import fetch, read, select
from gvl_jax.data.loader import SampleRejected, to_example
from gvl_jax.data.prepared import Samples, load_samples, modality
from gvl_jax.data.records import picture_paths
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.guard.closing import Closing, closing
from gvl_jax.guard.prompt import has_response
from gvl_jax.guard.scores import TASKS, evaluate, judge, row_of
from gvl_jax.metrics import MetricsWriter, progress
from gvl_jax.models.qwen_vl.config import QwenVLConfig
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

SHOWN = 200  # records in samples.jsonl
CHUNK = 8  # micro-batches of prompts judged between two writes


def run(config: Eval) -> list[dict]:
    """→ the table of scores, also in `output`/scores.json."""
    if not (config.data or config.benchmarks):
        raise ConfigError("data is not set, nor are benchmarks; give JSONL files, or names such as all")
    folder = open_run(config, "model", "output")
    result, judgements = folder / "scores.json", own_file(folder / "judgements.jsonl")
    if done_already(result):
        return json.loads(result.read_text(encoding="utf-8"))
    names, samples = to_judge(config, folder)
    source = resolve(config.model)
    tokenizer = load_tokenizer(source)
    model_config = replace(load_config(source), dtype=config.dtype)
    mesh = make_mesh(config.mesh)
    where = shardings(mesh, abstract_params(model_config))
    params = load_params(source, model_config, dtype=np.dtype(config.dtype), shardings=where)
    models = copies(mesh, params, config.dtype)
    del params
    sampler = Sampler(tokenizer, model_config, config.buckets, config.sampling, config.prompts, ahead=True)
    forced = closing(tokenizer, model_config.text.vocab_size) if config.scores == "fast" else None
    scorer = _scorer(config, tokenizer, model_config, forced) if forced else None
    longest = max(config.buckets.prompt) - (len(forced.opening) if forced else 0)

    done, left = own_share(len(samples), judgements, CHUNK * config.prompts * len(models))
    began, generated = time.monotonic(), 0
    with stopping() as asked, progress(done + sum(map(len, left)), "eval", initial=done) as advance:
        for part in left:
            if asked():
                raise Stopped(f"{done} items are judged")
            examples: dict[int, Example] = {}
            chunk = {index: samples[index] for index in part}
            rows = []
            for index, sample in chunk.items():
                try:
                    examples[index] = to_example(sample, tokenizer, config.images, longest)
                except SampleRejected as rejection:  # judged by nobody: a failure, not a missing row
                    row = _row(index, names[index], sample, "", False, None, folder)
                    rows.append(row | {"rejected": rejection.reason})
            completions = sampler.complete(models, list(examples.values()), names=list(examples))
            for index, (said,) in zip(examples, completions, strict=True):
                tokens = _reasoning_tokens(tokenizer, said.text)
                rows.append(_row(index, names[index], chunk[index], said.text, said.finished, tokens, folder))
                generated += said.tokens
            if scorer and examples:
                answered = {index: has_response(chunk[index]) for index in examples}
                fast = scorer.complete(models, list(examples.values()), has_response=list(answered.values()), fast=True)
                scores = {
                    index: (said.scores[0], said.scores[1] if answered[index] else None)
                    for index, (said,) in zip(examples, fast, strict=True)
                }
                for row in rows:
                    row["request_score"], row["response_score"] = scores.get(row["index"], (None, None))
            append_rows(judgements, rows)
            done += len(part)
            advance(len(part))

    seconds = time.monotonic() - began
    judged = sorted(gather(keep_rows(judgements, lambda row: True)), key=lambda row: row["index"])
    work = gather([(sum(map(len, left)), generated)])
    if records := sum(records for records, _ in work):
        metrics = MetricsWriter(folder)
        metrics.write(len(judged), {
            "perf/records_per_second": records / seconds,
            "perf/generated_tokens_per_second": sum(tokens for _, tokens in work) / seconds,
        })  # fmt: skip
        metrics.close()
    scored = [row_of(row) for row in judged]
    if jax.process_index() == 0:  # what the reports show: pictures of prepared data sets are not files yet
        for row, one in zip(judged, scored, strict=True):
            verdicts = [judge(one, task, "strict") for task in TASKS]
            if row["index"] < SHOWN or any(verdict and verdict.predicted != verdict.gold for verdict in verdicts):
                row["images"] = picture_paths(samples[row["index"]], folder)
    replace_text(folder / "judgements.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged))
    replace_text(folder / "samples.jsonl", "".join(json.dumps(row | {"step": 0}) + "\n" for row in judged[:SHOWN]))
    table = evaluate(scored, "strict") + evaluate(scored, "reference")
    replace_text(result, json.dumps(table, indent=1))
    return table


def to_judge(config: Eval, folder: Path) -> tuple[list[str], Samples]:
    """What is judged, and for each record the name of its data file or benchmark. benchmarks.json in the folder says
    where those are from. Raises ConfigError for two of one name."""
    chosen = select(config.benchmarks)
    names = [*(Path(path).stem for path in config.data), *(benchmark.name for benchmark in chosen)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{twice[0]} names two of data and benchmarks, whose scores would be mixed; rename a file")
    roots = [fetch(benchmark, config.benchmark_files or None) for benchmark in chosen]
    parts: list[Sequence[Sample]] = [load_samples([path], config.limit) for path in config.data]
    parts += [read(benchmark, root)[: config.limit] for benchmark, root in zip(chosen, roots, strict=True)]
    where_from = {benchmark.name: str(root) for benchmark, root in zip(chosen, roots, strict=True)}  # with the commit
    replace_text(folder / "benchmarks.json", json.dumps(where_from, indent=1))
    return [name for name, part in zip(names, parts, strict=True) for _ in range(len(part))], Samples(parts)


def _scorer(config: Eval, tokenizer, model_config: QwenVLConfig, forced: Closing) -> Sampler:
    """Says the labels alone, with P(harmful) of each."""
    sampling = Sampling(temperature=0.0, max_new_tokens=int(forced.length))
    return Sampler(tokenizer, model_config, config.buckets, sampling, config.prompts, closing=forced, ahead=True)


def _row(
    index: int, benchmark: str, sample: Sample, text: str, finished: bool, tokens: int | None, folder: Path
) -> dict:  # fmt: skip
    """A line of judgements.jsonl: what the report shows, and what the scores are made from, see `row_of`."""
    return sample_row(sample, text, finished, picture_paths(sample, folder, write=False)) | {
        "index": index,
        "finished": finished,
        "benchmark": benchmark,
        "modality": modality(sample),
        "tokens": tokens,
        "request_score": None,
        "response_score": None,
        "category": sample.category,
        "rejected": None,
    }


def _reasoning_tokens(tokenizer, completion: str) -> int:
    """Tokens between <think> and </think>; of the whole completion if the block is not closed."""
    reasoning, closed, _ = completion.partition("</think>")
    return len(tokenizer.encode_text(reasoning.removeprefix("<think>").strip() if closed else completion))

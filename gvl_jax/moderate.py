"""The guard as a function: a request, a response and pictures in, a judgement out; and the same for a JSONL file.

Whatever is wrong with an input or with the model's answer becomes a judgement too, one that blocks: it fails closed.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL.Image import Image

from gvl_jax.config import ConfigError, Dtype, Images, Moderate, Sampling
from gvl_jax.data.loader import SampleRejected, to_example
from gvl_jax.data.records import BadRecord, read_records
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.guard.verdict import flagged, parse, with_label
from gvl_jax.metrics import progress
from gvl_jax.models.qwen_vl.hub import image_bounds, load_config, load_params, resolve
from gvl_jax.run_folder import replace_text
from gvl_jax.sampler import Completion, Sampler
from gvl_jax.types import Example, Label, Sample

CHUNK = 4  # micro-batches judged between two writes
ROW_START = b'{"id": '  # of every row of an output


class Judgement(NamedTuple):
    """What the guard says of one sample. `flagged` is the one to act on."""

    id: str
    request: Label | None  # None: no verdict
    response: Label | None  # None: no verdict, or no response was given
    flagged: bool  # harmful, or no verdict at all
    status: str  # ok, parse_failed, truncated, input_rejected
    reason: str | None  # why an input was rejected
    reasoning: str | None
    warnings: tuple[str, ...]  # reasoning_conflict
    scores: dict[str, float | None]  # P(harmful) at the label, after the reasoning: near 0 or 1, and no calibration
    tokens: int  # generated

    @classmethod
    def rejected(cls, id: str, reason: str) -> "Judgement":
        return cls(id, None, None, True, "input_rejected", reason, None, (), {"request": None, "response": None}, 0)


class Guard:
    """A Qwen2.5-VL guard from a checkpoint directory or hub id."""

    def __init__(self, config: Moderate):
        source = resolve(config.model, config.revision)
        self.config, self.tokenizer = config, load_tokenizer(source)
        self.model_config = replace(load_config(source), dtype=config.dtype)
        self.params = jax.tree.map(jnp.asarray, load_params(source, self.model_config, dtype=np.dtype(config.dtype)))
        low, high = image_bounds(source)
        self.images = Images(config.min_pixels or low, config.max_pixels or high)
        sampling = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
        self.sampler = Sampler(self.tokenizer, self.model_config, config.buckets, sampling, config.prompts)

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, revision: str | None = None, dtype: Dtype = "bfloat16"
    ) -> "Guard":
        """Load a checkpoint. Raises HubError: not found, or not a whole Qwen2.5-VL checkpoint."""
        return cls(Moderate(model=str(name_or_dir), revision=revision, dtype=dtype))

    def moderate(
        self, request: str = "", response: str | None = None, images: Sequence[str | Path | bytes | Image] = ()
    ) -> Judgement:
        """Judge one request, its response if there is one, and its pictures (paths, encoded bytes or PIL images)."""
        sources = tuple(Path(image) if isinstance(image, str) else image for image in images)
        return self.moderate_batch([Sample("request", request, response, sources)])[0]

    def moderate_batch(self, samples: Sequence[Sample]) -> list[Judgement]:
        """Judge many, in order. A sample that cannot be judged gives an `input_rejected` judgement."""
        judged: dict[int, Judgement] = {}
        examples: dict[int, Example] = {}
        for index, sample in enumerate(samples):
            try:
                if len(sample.images) > self.config.max_images:
                    message = f"got {len(sample.images)} images, at most {self.config.max_images} allowed"
                    raise SampleRejected("too_many_images", message)
                texts = (sample.request, sample.response or "", sample.user_turn or "")
                if max(map(len, texts)) > self.config.max_characters:
                    raise SampleRejected("too_long", f"over {self.config.max_characters} characters of text")
                longest = max(self.config.buckets.prompt)
                examples[index] = to_example(sample, self.tokenizer, self.images, longest)
            except ValueError as error:  # SampleRejected, or a user turn whose tags are not its images
                reason = error.reason if isinstance(error, SampleRejected) else "invalid"
                judged[index] = Judgement.rejected(sample.id, f"{reason}: {error}")
        completions = self.sampler.complete(self.params, list(examples.values()))
        for index, (said,) in zip(examples, completions, strict=True):
            judged[index] = _judgement(samples[index], said)
        accepted = [
            (index, said.text)
            for index, (said,) in zip(examples, completions, strict=True)
            if judged[index].status == "ok"
        ]
        scores = self._scores([examples[index] for index, _ in accepted], [text for _, text in accepted])
        for (index, _), (request, response) in zip(accepted, scores, strict=True):
            known = {"request": request, "response": response if samples[index].response else None}
            judged[index] = judged[index]._replace(scores=known)
        return [judged[index] for index in range(len(samples))]

    def _scores(self, prompts: list[Example], texts: list[str]) -> list[tuple[float, float]]:
        """P(harmful) of (request, response): the label against its opposite, where it stands after the reasoning."""
        candidates = [
            [
                self.tokenizer.encode_text(with_label(text, task, label))
                for task in ("request", "response")
                for label in ("harmful", "unharmful")
            ]
            for text in texts
        ]
        scores = []
        for harmful, unharmful, harmful_response, unharmful_response in self.sampler.score(
            self.params, prompts, candidates
        ):
            scores.append((_share(harmful, unharmful), _share(harmful_response, unharmful_response)))
        return scores


def _share(first: np.ndarray, second: np.ndarray) -> float:
    """P(first) / (P(first) + P(second)) of two continuations, from the log-probs of their tokens."""
    return float(1 / (1 + np.exp(np.clip(second.sum() - first.sum(), -700, 700))))


def _judgement(sample: Sample, said: Completion) -> Judgement:
    verdict = parse(said.text, said.finished)
    if not sample.response and sample.user_turn is None:  # a verdict on a response that was not given says nothing
        verdict = verdict._replace(response=None)
    blocks = flagged(verdict, has_response=bool(sample.response))
    return Judgement(
        sample.id, verdict.request, verdict.response, blocks, verdict.status, None, verdict.reasoning, verdict.warnings,
        {"request": None, "response": None}, said.tokens,
    )  # fmt: skip


def run(config: Moderate) -> int:
    """Judge every line of `config.input`, or the one record of the flags. → how many were flagged.

    Rows go to `config.output` (or standard output) in the order of the lines; a bad line becomes an `input_rejected`
    row. An interrupted run keeps what is done and is continued by the same command. Raises ConfigError, HubError.
    """
    if not config.model:
        raise ConfigError("model is not set; give a checkpoint directory or a hub id")
    if config.input:
        lines = list(read_records(config.input))
        if not lines:
            raise ConfigError(f"{config.input} is empty; expected one JSON object a line")
    elif config.request or config.response or config.image:
        lines = [Sample("request", config.request, config.response, tuple(Path(image) for image in config.image))]
    else:
        raise ConfigError("nothing to judge; give --input FILE, or --request, --response and --image")

    chunk = CHUNK * config.prompts
    done = _done(config, lines, chunk)
    guard = Guard(config)
    flags = sum(row["flagged"] for row in done)
    with ExitStack() as stack:
        out = stack.enter_context(open(config.output, "a", encoding="utf-8")) if config.output else sys.stdout
        advance = stack.enter_context(progress(len(lines), "moderate", initial=len(done))) if config.output else None
        for start in range(len(done), len(lines), chunk):
            part = lines[start : start + chunk]
            judged = iter(guard.moderate_batch([line for line in part if isinstance(line, Sample)]))
            for line in part:
                row = next(judged) if isinstance(line, Sample) else Judgement.rejected(_name(line), line.reason)
                flags += row.flagged
                out.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")
            out.flush()
            if advance:
                advance(len(part), note=f"{flags} flagged")
    return flags


def _done(config: Moderate, lines: list[Sample | BadRecord], chunk: int) -> list[dict]:
    """The rows an interrupted run has written, in whole chunks; the rest of the output is dropped.

    Raises ConfigError, and changes nothing, if the output is not the beginning of this job."""
    path = Path(config.output)
    if not config.output or not path.exists():
        return []
    if path.resolve() == Path(config.input).resolve():
        raise ConfigError(f"output is the input, {config.input}; give another file")
    *whole, cut = path.read_bytes().split(b"\n")
    try:
        rows = [json.loads(line) for line in whole]
        ours = all(tuple(row) == Judgement._fields for row in rows)
        ours = ours and [row["id"] for row in rows] == [_name(line) for line in lines[: len(rows)]]
    except (ValueError, TypeError):  # not JSON, or not an object
        ours = False
    if not ours or not (cut.startswith(ROW_START) or ROW_START.startswith(cut)):
        raise ConfigError(f"{path} exists and is not the beginning of this job; give another file")
    if len(rows) < len(lines):
        rows = rows[: len(rows) // chunk * chunk]  # with the same micro-batches as without a stop
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _name(line: Sample | BadRecord) -> str:
    return line.id if isinstance(line, Sample) else line.id or f"line {line.line}"

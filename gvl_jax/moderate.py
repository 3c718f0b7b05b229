"""The guard as a function: a request, a response and pictures in, a judgement out; and the same for a JSONL file.

Whatever is wrong with an input or with the model's answer becomes a judgement too, one that blocks: it fails closed.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast, get_args

import numpy as np
from PIL.Image import Image

from gvl_jax.config import ConfigError, Dtype, Images, Mode, Moderate, Sampling
from gvl_jax.data.loader import SampleRejected, to_example
from gvl_jax.data.packing import example_sizes
from gvl_jax.data.records import BadRecord, read_records
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.guard.calibration import Calibration, load_calibrations
from gvl_jax.guard.closing import closing
from gvl_jax.guard.prompt import has_response
from gvl_jax.guard.verdict import flagged, parse
from gvl_jax.metrics import progress
from gvl_jax.models.qwen_vl.hub import image_bounds, load_config, load_params, resolve
from gvl_jax.models.qwen_vl.model import abstract_params
from gvl_jax.run_folder import replace_text
from gvl_jax.sampler import Completion, Sampler
from gvl_jax.sharding import copies, make_mesh, shardings
from gvl_jax.types import Example, Label, Sample

CHUNK = 4  # micro-batches judged between two writes
ROW_START = b'{"id": '  # of every row of an output


class Judgement(NamedTuple):
    """What the guard says of one sample. `flagged` is the one to act on."""

    id: str
    request: Label | None  # None: no verdict
    response: Label | None  # None: no verdict, or no response was given
    flagged: bool  # harmful, or no verdict at all
    status: str  # ok, parse_failed, truncated (the reasoning ran out of budget), input_rejected, deadline, internal
    decided_by: str  # fast, reason, or fail_closed: any status but ok blocks
    reason: str | None  # why there is no judgement of the input
    reasoning: str | None
    warnings: tuple[str, ...]  # reasoning_conflict
    # P(harmful) where the label stands: `fast` ones as `calibrated` corrects them; after reasoning near 0 or 1
    scores: dict[str, float | None]
    tokens: int  # generated
    prompt_tokens: int = 0

    @classmethod
    def rejected(cls, id: str, reason: str, status: str = "input_rejected") -> "Judgement":
        """Blocked without a look at it."""
        unknown: dict[str, float | None] = {"request": None, "response": None}
        return cls(id, None, None, True, status, "fail_closed", reason, None, (), unknown, 0)


class Guard:
    """A Qwen2.5-VL guard from a checkpoint directory or hub id."""

    def __init__(self, config: Moderate):
        source = resolve(config.model, config.revision)
        self.config, self.tokenizer = config, load_tokenizer(source)
        self.model_config = replace(load_config(source), dtype=config.dtype)
        mesh = make_mesh(config.mesh)
        where = shardings(mesh, abstract_params(self.model_config))
        params = load_params(source, self.model_config, dtype=np.dtype(config.dtype), shardings=where)
        self.models = copies(mesh, params, config.dtype)
        del params
        low, high = image_bounds(source)
        self.images = Images(config.min_pixels or low, config.max_pixels or high)
        self.calibrations = load_calibrations(source)  # of fast scores, by task; labels stay the model's own
        self.closing = closing(self.tokenizer, self.model_config.text.vocab_size)

        sampling = Sampling(temperature=0.0, max_new_tokens=config.reasoning_budget + int(self.closing.length))
        self.sampler = Sampler(
            self.tokenizer, self.model_config, config.buckets, sampling, config.prompts, closing=self.closing
        )
        self._thread = ThreadPoolExecutor(1, "guard")  # of the async calls, which wait for each other

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, revision: str | None = None, dtype: Dtype = "bfloat16"
    ) -> "Guard":
        """Load a checkpoint. Raises HubError: not found, or not a whole Qwen2.5-VL checkpoint."""
        return cls(Moderate(model=str(name_or_dir), revision=revision, dtype=dtype))

    def moderate(
        self,
        request: str = "",
        response: str | None = None,
        images: Sequence[str | Path | bytes | Image] = (),
        *,
        mode: Mode | None = None,
        budget: int | None = None,
    ) -> Judgement:
        """Judge one request, its response if there is one, and its pictures (paths, encoded bytes or PIL images).

        mode, budget: those of the settings, unless given; budget: tokens of reasoning, at most those of the settings.
        Raises ValueError for another mode or budget."""
        sources = tuple(Path(image) if isinstance(image, str) else image for image in images)
        return self.moderate_batch([Sample("request", request, response, sources)], mode=mode, budget=budget)[0]

    async def amoderate(
        self, request: str = "", response: str | None = None, images: Sequence[str | Path | bytes | Image] = (),
        **options,
    ) -> Judgement:  # fmt: skip
        """`moderate` beside an event loop. For many callers at a time: `serve.engine`, which batches them."""
        call = partial(self.moderate, request, response, images, **options)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def amoderate_batch(self, samples: Sequence[Sample], **options) -> list[Judgement]:
        """`moderate_batch` beside an event loop."""
        call = partial(self.moderate_batch, samples, **options)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def moderate_batch(
        self, samples: Sequence[Sample], *, mode: Mode | None = None, budget: int | None = None
    ) -> list[Judgement]:
        """Judge many, in order. A sample that cannot be judged gives an `input_rejected` judgement.

        mode, budget: as for `moderate`."""
        mode, tokens = self.asked(mode, budget)
        judged: dict[int, Judgement] = {}
        examples: dict[int, Example] = {}
        for index, sample in enumerate(samples):
            try:
                examples[index] = self.example(sample)
            except SampleRejected as error:
                judged[index] = Judgement.rejected(sample.id, f"{error.reason}: {error}")
        if mode != "reason":
            for index, said in self._complete(samples, examples, tokens, fast=True):
                fast = judgement(samples[index], examples[index], said, fast=True)
                judged[index] = calibrated(fast, self.calibrations)
                if mode == "fast" or not self.uncertain(fast):
                    del examples[index]
        for index, said in self._complete(samples, examples, tokens):
            judged[index] = judgement(samples[index], examples[index], said)
        return [judged[index] for index in range(len(samples))]

    def asked(self, mode: str | None, budget: int | None) -> tuple[Mode, int]:
        """(mode, tokens of a completion at most) for a call that asks for these. Raises ValueError."""
        most = self.config.reasoning_budget
        mode, budget = mode or self.config.mode, most if budget is None else budget
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
        if not 1 <= budget <= most:
            raise ValueError(f"the reasoning budget is {budget} tokens, expected 1 to {most}, that of the settings")
        return cast(Mode, mode), budget + int(self.closing.length)

    def example(self, sample: Sample) -> Example:
        """The prompt of a sample. Raises SampleRejected: too much of something, or a bad picture."""
        if len(sample.images) > self.config.max_images:
            message = f"got {len(sample.images)} images, at most {self.config.max_images} allowed"
            raise SampleRejected("too_many_images", message)
        texts = (sample.request, sample.response or "", sample.user_turn or "")
        if max(map(len, texts)) > self.config.max_characters:
            raise SampleRejected("too_long", f"over {self.config.max_characters} characters of text")
        longest = max(self.config.buckets.prompt) - len(self.closing.opening)
        try:
            example = to_example(sample, self.tokenizer, self.images, longest)
            self.sampler.layout.bucket(*example_sizes([example], self.sampler.layout)[0, 1:])
        except SampleRejected:
            raise
        except ValueError as error:  # more patches than a buffer holds
            raise SampleRejected("invalid", str(error)) from error
        return example

    def uncertain(self, judged: Judgement) -> bool:
        """Whether `auto` reasons about what was judged fast."""
        scores = [score for score in judged.scores.values() if score is not None]
        return any(self.config.uncertain_from <= score <= self.config.uncertain_to for score in scores)

    def _complete(self, samples: Sequence[Sample], examples: dict[int, Example], tokens: int, fast: bool = False):
        """(index, completion) of the examples."""
        if not examples:
            return []
        responses = [has_response(samples[index]) for index in examples]
        completions = self.sampler.complete(
            self.models, list(examples.values()), has_response=responses, budgets=[tokens] * len(examples), fast=fast
        )
        return [(index, said) for index, (said,) in zip(examples, completions, strict=True)]


def _scores(sample: Sample, said: Completion) -> dict[str, float | None]:
    return {"request": said.scores[0], "response": said.scores[1] if has_response(sample) else None}


def calibrated(judged: Judgement, calibrations: Mapping[str, Calibration]) -> Judgement:
    """A fast judgement with its scores as `gvl calibrate` corrects them; the labels stay the model's own."""
    scores = dict(judged.scores)
    for task, calibration in calibrations.items():
        if (score := scores[task]) is not None:
            scores[task] = float(calibration(score))
    return judged._replace(scores=scores)


def judgement(sample: Sample, prompt: Example, said: Completion, fast: bool = False) -> Judgement:
    """The verdict that was forced, or that after reasoning. Cut reasoning has one too, but it blocks: the sender may
    have caused the cut."""
    scores, tokens = _scores(sample, said), (said.tokens, len(prompt.tokens))
    if fast:
        labels: list[Label | None] = [
            None if score is None else "unharmful" if score < 0.5 else "harmful" for score in scores.values()
        ]
        return Judgement(
            sample.id, labels[0], labels[1], "harmful" in labels, "ok", "fast", None, None, (), scores, *tokens
        )
    verdict = parse(said.text, said.finished)
    status = "truncated" if said.cut else verdict.status
    blocks = status != "ok" or flagged(verdict, has_response=has_response(sample))
    return Judgement(
        sample.id, verdict.request, verdict.response, blocks, status, "reason" if status == "ok" else "fail_closed",
        None, verdict.reasoning, verdict.warnings,
        scores if verdict.status == "ok" else dict.fromkeys(("request", "response")), *tokens,
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
    guard.sampler.ahead = bool(config.input and config.output)  # whose progress would stand among the rows otherwise
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

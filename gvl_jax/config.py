"""One frozen dataclass per stage. `settings.load` fills it from a YAML file and flags.

Defaults are the paper's. Where the authors' released code differs, the field names both values.
"""

from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from gvl_jax.types import Remat

Dtype = Literal["float32", "bfloat16"]
Resume = Literal["auto", "never"]
Mode = Literal["fast", "reason", "auto"]
Trained = Literal["all", "language"]  # language: the vision tower and its merger stay frozen


class ConfigError(ValueError):
    """A setting that cannot be used: which file and key, what was found, what was expected."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(config: Any, *names: str) -> None:
    """Raises ValueError for the first of the named whole numbers below 1; None (no limit) passes."""
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= 1, f"{name} is {value}, expected at least 1")


@dataclass(frozen=True)
class Images:
    """Bounds of the smart resize, in pixels of the resized picture."""

    min_pixels: int = 32 * 32
    max_pixels: int = 768 * 768

    def __post_init__(self) -> None:
        _require(
            0 < self.min_pixels <= self.max_pixels,
            f"images.min_pixels is {self.min_pixels} and images.max_pixels {self.max_pixels}, expected 0 < min_pixels "
            "<= max_pixels; both count pixels of the whole picture, not of a side",
        )


@dataclass(frozen=True)
class Optim:
    """AdamW and its learning-rate schedule."""

    peak_lr: float = 5e-5
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to 0 after the last step
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # global norm of the gradient

    def __post_init__(self) -> None:
        _require(0 < self.peak_lr < 1, f"optim.peak_lr is {self.peak_lr}, expected above 0 and below 1, such as 5e-5")
        _require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}, expected 0 (none) or more")
        for name, beta in (("b1", self.b1), ("b2", self.b2)):
            _require(0 <= beta < 1, f"optim.{name} is {beta}, expected at least 0 and below 1, such as 0.9")
        _require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}, expected 0 (none) or more")
        _require(self.clip_norm > 0, f"optim.clip_norm is {self.clip_norm}, expected above 0; give inf not to clip")


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. temperature 0: greedy. top_p 1, top_k 0: the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, f"sampling.temperature is {self.temperature}, expected 0 (greedy) or more")
        _require(0 < self.top_p <= 1, f"sampling.top_p is {self.top_p}, expected above 0 and at most 1 (all tokens)")
        _require(self.top_k >= 0, f"sampling.top_k is {self.top_k}, expected 0 (all tokens) or more")
        _require(self.max_new_tokens >= 1, f"sampling.max_new_tokens is {self.max_new_tokens}, expected at least 1")


@dataclass(frozen=True)
class Buckets:
    """The fixed shapes that everything is padded to, so that nothing recompiles."""

    prompt: tuple[int, ...] = (512, 1024, 2048, 3072)  # tokens of a prompt (sampler, RL)
    completion: tuple[int, ...] = (256, 512, 1024, 2048, 4096)  # tokens of a completion in an RL update
    patches: tuple[int, ...] = (4096, 16384, 65536)  # image patches of a micro-batch; no image: the tower is skipped

    def __post_init__(self) -> None:
        for name in ("prompt", "completion", "patches"):
            sizes = getattr(self, name)
            rising = all(low < high for low, high in zip((0, *sizes), sizes, strict=False))
            _require(
                bool(sizes) and rising,
                f"buckets.{name} is {list(sizes)}, expected one size or more, from 1, each larger than the one before",
            )
        odd = [size for size in self.patches if size % 4]
        _require(not odd, f"buckets.patches has {odd}, expected multiples of 4: four patches make one image token")


@dataclass(frozen=True)
class Mesh:
    """How the devices of all hosts are arranged: data x fsdp x tensor. Where nothing is trained, each of the
    data x fsdp parts has a copy of the model."""

    data: int | None = None  # copies of what the others split; null: as many as there are devices for
    fsdp: int = 1  # parts of every weight matrix, its gradient and its optimizer state
    tensor: int = 1  # parts of the heads, the feed-forward width and the vocabulary; within a host

    def __post_init__(self) -> None:
        _positive(self, "data", "fsdp", "tensor")


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning on reasoning (PAPER §3)."""

    model: str = ""  # checkpoint directory or hub id
    train: tuple[str, ...] = ()  # JSONL files, and folders of `gvl data prepare`
    train_weights: tuple[float, ...] = ()  # how often each of `train` is drawn, in proportion; none: by its size
    output: str = ""  # run folder
    reasoning: bool = True  # False: learn the result block alone (the paper's baseline)
    trained: Trained = "all"  # as released: language
    epochs: int = 3
    global_batch: int = 192  # samples per step
    rows: int = 8  # packed rows of a micro-batch, on each of the data x fsdp parts of the devices
    max_length: int = 2048  # tokens of a row, images included
    limit: int | None = None  # first samples of `train` only; under train_weights, samples of an epoch
    seed: int = 0
    dtype: Dtype = "bfloat16"
    remat: Remat = "layers"  # recomputed in the backward pass: nothing, all but matrix products, whole layers
    save_every: int = 100  # steps
    keep: int = 2  # newest checkpoints
    keep_best: bool = False  # also the one with the lowest loss, of the steps since the checkpoint before it
    workers: int | None = None  # threads that read and shape the input; none given: one per core, at most 16
    checkpoints: str = ""  # their folder, also gs://bucket/path; none given: `output`/checkpoints
    resume: Resume = "auto"
    mesh: Mesh = field(default_factory=Mesh)
    images: Images = field(default_factory=Images)
    buckets: Buckets = field(default_factory=Buckets)
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        _positive(self, "epochs", "global_batch", "rows", "max_length", "limit", "save_every", "keep", "workers")
        _require(
            not self.train_weights or (len(self.train_weights) == len(self.train) and min(self.train_weights) > 0),
            f"train_weights is {list(self.train_weights)}, expected a number above 0 for each of the "
            f"{len(self.train)} of train, or none",
        )


@dataclass(frozen=True)
class Mine:
    """Rejection sampling: which items the SFT model gets wrong (PAPER §4)."""

    model: str = ""
    train: tuple[str, ...] = ()
    output: str = ""  # run folder; hard.jsonl is the result
    keep: Literal["all_wrong", "any_wrong", "mixed"] = "all_wrong"
    samples: int = 4  # completions per item
    size: int = 12_000  # items kept, drawn at random from the hard ones
    prompts: int = 32  # prompts decoded together, by each copy of the model
    limit: int | None = None
    seed: int = 0
    dtype: Dtype = "bfloat16"
    resume: Resume = "auto"
    mesh: Mesh = field(default_factory=Mesh)
    images: Images = field(default_factory=Images)
    buckets: Buckets = field(default_factory=Buckets)
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0, top_p=0.95, max_new_tokens=2048))

    def __post_init__(self) -> None:
        _positive(self, "samples", "size", "prompts", "limit")
        _require(
            self.keep != "mixed" or self.samples >= 2,
            f"samples is {self.samples} with keep: mixed, expected at least 2: a single one is never mixed",
        )
        _require(
            self.samples == 1 or self.sampling.temperature > 0,
            f"sampling.temperature is 0 with samples {self.samples}, which gives {self.samples} equal completions; "
            "raise it above 0 or set samples to 1",
        )


@dataclass(frozen=True)
class Rl:
    """Online RL: group-relative advantages, dynamic clip, length-aware reward (PAPER §5-7)."""

    model: str = ""
    train: tuple[str, ...] = ()  # usually the hard.jsonl of a mining run
    output: str = ""
    trained: Trained = "all"
    mixed_share: float = 0.2  # share of the RL set that safety-aware mixing makes
    mix_images: Literal["merged", "both"] = "merged"  # of a mix of two samples with pictures: as one, or as they are
    beta: float = 1.0  # Eq. 10; 1/6: GuardReasoner-VL-Eco
    reward: Literal["paper", "as_released"] = "paper"
    max_length: int = 3072  # characters where l_norm = 1: of the reasoning (paper), of the whole output (as released)
    epsilon: float = 0.2  # Eq. 7
    clip: Literal["dynamic", "constant"] = "dynamic"  # as released: constant (the schedule never reached the loss)
    loss_mean: Literal["sequence", "token"] = "sequence"  # as released: token
    std_epsilon: float = 1e-6  # added to the unbiased standard deviation of a group's rewards
    blank_image_for_text: bool = False  # as released: True, a 1x1 white picture on every text-only row
    group_size: int = 16
    prompts_per_step: int = 512  # prompts of a rollout batch
    prompts_per_update: int = 256  # as released: 128
    prompts: int = 4  # prompts decoded together, on each of the data x fsdp parts of the devices
    rows: int = 1  # prompts with their groups that are scored or trained together, on each of those parts
    slots: int | None = None  # completions of a prompt decoded at a time, the others follow; null: the whole group
    epochs: int = 1
    limit: int | None = None
    seed: int = 0
    dtype: Dtype = "bfloat16"
    remat: Remat = "layers"  # recomputed in the backward pass: nothing, all but matrix products, whole layers
    save_every: int = 1  # steps
    keep: int = 2  # newest checkpoints
    keep_best: bool = False  # also the one with the highest reward, of the steps since the checkpoint before it
    workers: int | None = None  # threads that read and shape the input; none given: one per core, at most 16
    checkpoints: str = ""  # their folder, also gs://bucket/path; none given: `output`/checkpoints
    resume: Resume = "auto"
    mesh: Mesh = field(default_factory=Mesh)
    images: Images = field(default_factory=lambda: Images(min_pixels=262_144, max_pixels=4_194_304))
    buckets: Buckets = field(default_factory=Buckets)
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.2, max_new_tokens=3072))
    optim: Optim = field(default_factory=lambda: Optim(peak_lr=1e-6, schedule="constant", weight_decay=1e-2))

    def __post_init__(self) -> None:
        _positive(self, "max_length", "prompts_per_step", "prompts_per_update", "prompts", "rows", "slots", "epochs")
        _positive(self, "limit", "save_every", "keep", "workers")
        _require(0 <= self.mixed_share < 1, f"mixed_share is {self.mixed_share}, expected at least 0 and below 1")
        _require(0 < self.beta <= 1, f"beta is {self.beta}, expected above 0 and at most 1: it caps l_norm; 1 = no cap")
        _require(0 < self.epsilon < 1, f"epsilon is {self.epsilon}, expected above 0 and below 1, such as 0.2")
        _require(self.std_epsilon > 0, f"std_epsilon is {self.std_epsilon}, expected above 0: a spread can be 0")
        _require(self.group_size >= 2, f"group_size is {self.group_size}, expected at least 2: a group is compared")
        _require(
            self.sampling.temperature > 0,
            "sampling.temperature is 0, which makes every completion of a group the same; raise it above 0",
        )
        _require(
            self.prompts_per_step % self.prompts_per_update == 0,
            f"prompts_per_step {self.prompts_per_step} is no multiple of prompts_per_update {self.prompts_per_update}; "
            "every update of a rollout batch takes as many prompts",
        )
        _require(
            self.prompts_per_update % self.rows == 0,
            f"prompts_per_update {self.prompts_per_update} is no multiple of rows {self.rows}; "
            "lower rows, the number that is computed at once",
        )


@dataclass(frozen=True)
class Eval:
    """Greedy judgements of labelled records, scored under both rules (PAPER §8)."""

    model: str = ""
    data: tuple[str, ...] = ()  # JSONL files or prepared folders, one benchmark each
    benchmarks: tuple[str, ...] = ()  # names of data/benchmarks.py; all: those of the paper
    benchmark_files: str = ""  # folder of local copies of their repositories; what is not there comes from the hub
    output: str = ""
    prompts: int = 32  # prompts decoded together, by each copy of the model
    limit: int | None = None
    scores: Literal["none", "fast"] = "none"  # fast: also P(harmful), without reasoning: AUROC, AUPRC, calibration
    dtype: Dtype = "bfloat16"
    resume: Resume = "auto"
    mesh: Mesh = field(default_factory=Mesh)
    images: Images = field(default_factory=lambda: Images(min_pixels=262_144, max_pixels=4_194_304))
    buckets: Buckets = field(default_factory=Buckets)
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0, max_new_tokens=4096))

    def __post_init__(self) -> None:
        _positive(self, "prompts", "limit")


@dataclass(frozen=True)
class Moderate:
    """Judge requests, responses and pictures that nobody has vouched for."""

    model: str = ""  # checkpoint directory or hub id
    revision: str | None = None  # of a hub id
    input: str = ""  # JSONL; without it, --request, --response and --image make one record
    output: str = ""  # JSONL; without it, standard output
    request: str = ""
    response: str | None = None
    image: tuple[str, ...] = ()  # paths
    prompts: int = 16  # prompts decoded together, by each copy of the model
    mode: Mode = "reason"  # fast: no reasoning; auto: fast first, reason if uncertain
    uncertain_from: float = 0.02  # auto: a fast P(harmful) from here …
    uncertain_to: float = 0.98  # … to here is reasoned about
    reasoning_budget: int = 512  # tokens; reasoning that is longer is cut, and blocks
    max_images: int = 8  # of one record
    max_characters: int = 100_000  # of a request, of a response
    min_pixels: int | None = None  # default: the checkpoint's preprocessor_config.json
    max_pixels: int | None = None
    exit_code: bool = False  # exit with 3 if anything was flagged
    dtype: Dtype = "bfloat16"
    mesh: Mesh = field(default_factory=Mesh)
    buckets: Buckets = field(default_factory=lambda: Buckets(prompt=(512, 1536, 4096), patches=(1024, 4096, 16384)))

    def __post_init__(self) -> None:
        _positive(self, "prompts", "reasoning_budget", "max_images", "max_characters")
        _positive(self, "min_pixels", "max_pixels")
        _require(
            0 <= self.uncertain_from <= self.uncertain_to <= 1,
            f"uncertain_from is {self.uncertain_from} and uncertain_to {self.uncertain_to}, expected "
            "0 <= uncertain_from <= uncertain_to <= 1",
        )
        _require(
            not self.input or not (self.request or self.response or self.image),
            "input is set and so is request, response or image; give a file or one record, not both",
        )


@dataclass(frozen=True)
class Synthesize:
    """Reasoning from a teacher that is told the labels (PAPER §2), through any OpenAI-compatible endpoint."""

    model: str = ""  # the teacher, as the endpoint names it; paper: gpt-4o-2024-08-06
    data: tuple[str, ...] = ()  # JSONL files of labelled records
    output: str = ""  # folder; train.jsonl is the result
    base_url: str = ""  # of the endpoint, such as http://localhost:8000/v1; none given: OpenAI's
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    max_tokens: int = 2048  # of an answer
    retries: int = 2  # how often a bad answer is asked for again, with the reason
    tries: int = 6  # of a call that gets no answer: time-out, rate limit, server error
    timeout: float = 120.0  # seconds of a call
    concurrent: int = 16  # calls at a time
    requests_per_minute: int | None = None
    input_price: float = 0.0  # of a million tokens, in any currency
    output_price: float = 0.0
    max_cost: float | None = None  # in the same currency, of all answers in `output`, those of earlier runs too
    tokenizer: str = ""  # checkpoint directory, to count tokens with; none given: a token is four characters
    limit: int | None = None  # first records of `data` only
    images: Images = field(default_factory=Images)  # the size in which the teacher sees pictures

    def __post_init__(self) -> None:
        _positive(self, "max_tokens", "tries", "concurrent", "requests_per_minute", "limit")
        _require(self.retries >= 0, f"retries is {self.retries}, expected 0 (none) or more")
        _require(self.timeout > 0, f"timeout is {self.timeout}, expected seconds above 0")
        _require(min(self.input_price, self.output_price) >= 0, "a price is below 0, expected 0 (not known) or more")
        _require(
            self.max_cost is None or self.input_price + self.output_price > 0,
            "max_cost is set without prices; give input_price and output_price, of a million tokens",
        )
        url = urlsplit(self.base_url)
        _require(
            not self.base_url or (url.scheme in ("http", "https") and url.username is None),
            "base_url is not http://host… or https://host… without user and password; keys belong in the environment "
            "variable that key_variable names",
        )


@dataclass(frozen=True)
class Serve:
    """The guard as an HTTP service. Seconds, bytes and counts are of one request unless it says otherwise."""

    model: str = ""  # checkpoint directory or hub id
    revision: str | None = None  # of a hub id
    backend: str = ""  # http://host:8000/v1 of a vLLM or SGLang server that runs `model`; none given: this process does
    backend_name: str = ""  # under which that server knows it; none given: `model`
    backend_key_variable: str = "GVL_BACKEND_KEY"  # the environment variable that holds its key
    name: str = "gvl-guard"  # of the model, in answers
    host: str = "127.0.0.1"  # any other needs keys
    port: int = 8000
    keys: str = ""  # file with a bearer key on each line
    threshold: float = 0.5  # a P(harmful) from here on blocks; a verdict of harmful always does
    review_from: float | None = None  # a P(harmful) from here to the threshold asks for a review
    mode: Mode = "reason"
    uncertain_from: float = 0.02  # auto: a fast P(harmful) from here …
    uncertain_to: float = 0.98  # … to here is reasoned about
    reasoning_budget: int = 512  # tokens; reasoning that is longer is cut, and blocks
    deadline: float = 9.0  # a verdict that is not there by then blocks; gateways give up after 3, 10 or 30
    batch_deadline: float = 60.0  # of /v1/guard/batch
    max_body: int = 20_000_000
    max_items: int = 64  # texts of a moderation, rows of a batch
    max_images: int = 8  # of one judgement
    max_characters: int = 100_000  # of a request, of a response
    remote_hosts: tuple[str, ...] = ()  # whose pictures may be fetched by URL: example.org, *.example.org
    max_waiting: int = 256  # requests that have no row yet; more get a 429
    max_waiting_tokens: int = 65_536  # of their prompts
    decoders: int = 2  # processes that decode pictures
    prompts: int = 16  # prompts decoded together
    min_pixels: int | None = None  # default: the checkpoint's preprocessor_config.json
    max_pixels: int | None = None
    dtype: Dtype = "bfloat16"
    buckets: Buckets = field(default_factory=lambda: Buckets(prompt=(256, 512, 1024, 2048, 4096)))

    def __post_init__(self) -> None:
        _positive(self, "reasoning_budget", "max_body", "max_items", "max_images", "max_characters", "decoders")
        _positive(self, "prompts", "min_pixels", "max_pixels", "max_waiting", "max_waiting_tokens")
        low = self.threshold if self.review_from is None else self.review_from
        _require(
            0 <= low <= self.threshold <= 1,
            f"review_from is {self.review_from} and threshold {self.threshold}, expected 0 <= review_from <= threshold "
            "<= 1",
        )
        _require(0 < self.deadline, f"deadline is {self.deadline}, expected seconds above 0")
        _require(0 < self.batch_deadline, f"batch_deadline is {self.batch_deadline}, expected seconds above 0")
        url = urlsplit(self.backend)
        _require(
            not self.backend or (url.scheme in ("http", "https") and url.username is None),
            "backend is not http://host… or https://host… without user and password; its key belongs in the "
            "environment variable that backend_key_variable names",
        )
        _require(0 <= self.port < 65536, f"port is {self.port}, expected 0 (any free one) to 65535")
        _require(
            self.host in ("127.0.0.1", "::1", "localhost") or bool(self.keys),
            f"host is {self.host}, which others can reach, and keys is not set; give --keys FILE, a key on each line",
        )

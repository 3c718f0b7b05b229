from dataclasses import dataclass, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvl_jax.config import (
    Buckets,
    ConfigError,
    Eval,
    Images,
    Mine,
    Moderate,
    Optim,
    Rl,
    Sampling,
    Serve,
    Sft,
    Synthesize,
)
from gvl_jax.settings import dump, load

STAGES = [Sft, Mine, Rl, Eval, Moderate, Serve, Synthesize]


def write(folder, text, name="sft.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_then_file_then_flags(tmp_path):
    path = write(tmp_path, "rows: 4\nepochs: 2\ntrain: [a.jsonl, b.jsonl]\noptim:\n  peak_lr: 1.0e-4\n")
    config = load(Sft, path, ["--epochs", "5", "--optim.peak-lr", "2e-5", "--optim.clip-norm", "0.5"])
    assert config == Sft(rows=4, epochs=5, train=("a.jsonl", "b.jsonl"), optim=Optim(peak_lr=2e-5, clip_norm=0.5))


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path):
    assert load(Rl, None, []) == load(Rl, write(tmp_path, "# nothing yet\n"), []) == Rl()


def test_a_section_keeps_the_defaults_of_its_stage(tmp_path):
    config = load(Rl, write(tmp_path, "sampling: {top_p: 0.9}\n"), [])
    assert config.sampling == replace(Rl().sampling, top_p=0.9)
    assert config.sampling.max_new_tokens == 3072


def test_text_that_yaml_does_not_read_as_a_float_is_one(tmp_path):
    config = load(Sft, write(tmp_path, "optim: {peak_lr: 2e-5, weight_decay: 1}\n"), [])
    assert config.optim.peak_lr == 2e-5
    assert config.optim.weight_decay == 1.0 and type(config.optim.weight_decay) is float


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim: {peak_lrr: 1.0}", "sft.yaml: unknown key optim.peak_lrr; did you mean optim.peak_lr?"),
        ("epoch: 1", "sft.yaml: unknown key epoch; did you mean epochs?"),
        ("b1: 0.9", "sft.yaml: unknown key b1; did you mean optim.b1?"),
        ("3: 1", "sft.yaml: unknown key 3; known keys: model, train, "),
        ("rows: '8'", "sft.yaml: rows: got '8' (str), expected int"),
        ("rows: 8.0", "sft.yaml: rows: got 8.0 (float), expected int"),
        ("rows: true", "sft.yaml: rows: got True (bool), expected int"),
        ("rows:", "sft.yaml: rows: got nothing, expected int"),
        ("remat: true", "sft.yaml: remat: got True (bool), expected one of none, dots, layers"),
        ("limit: few", "sft.yaml: limit: got 'few' (str), expected int"),
        ("model: 3", "sft.yaml: model: got 3 (int), expected str"),
        ("train: a.jsonl", "sft.yaml: train: got 'a.jsonl' (str), expected a list of str"),
        ("buckets: {prompt: [1, x]}", "sft.yaml: buckets.prompt[1]: got 'x' (str), expected int"),
        ("dtype: float16", "sft.yaml: dtype: got 'float16' (str), expected one of float32, bfloat16"),
        ("optim: {peak_lr: fast}", "sft.yaml: optim.peak_lr: got 'fast' (str), expected float"),
        ("optim: {peak_lr: true}", "sft.yaml: optim.peak_lr: got True (bool), expected float"),
        ("optim:", "sft.yaml: optim: got nothing, expected a section with the keys peak_lr, schedule, "),
        ("- rows", "sft.yaml: the file: got ['rows'] (list), expected a section with the keys model, "),
        ("rows: [1", "sft.yaml: not valid YAML: "),
        ("epochs: 3\nrows: 2\nepochs: 1", "sft.yaml: not valid YAML: got the key epochs twice"),
        ("optim: {peak_lr: 1, peak_lr: 2}", "sft.yaml: not valid YAML: got the key peak_lr twice"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_key_got_and_expected(here, text, message):
    write(here, text)
    with pytest.raises(ConfigError) as error:
        load(Sft, "sft.yaml", [])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(here):
    with pytest.raises(ConfigError, match="^nowhere.yaml: cannot be read"):
        load(Sft, "nowhere.yaml", [])


@dataclass(frozen=True)
class Window:
    low: int = 1
    high: int = 2

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low {self.low} exceeds high {self.high}")


def test_contradictory_settings_name_the_file(here):
    write(here, "low: 3", "window.yaml")
    with pytest.raises(ConfigError, match="^window.yaml: low 3 exceeds high 2$"):
        load(Window, "window.yaml", [])


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (Images, {"min_pixels": 0}, "images.min_pixels is 0 and images.max_pixels 589824, expected 0 < min_pixels"),
        (Images, {"min_pixels": 200, "max_pixels": 100}, "images.min_pixels is 200 and images.max_pixels 100"),
        (Optim, {"peak_lr": 0.0}, "optim.peak_lr is 0.0, expected above 0"),
        (Optim, {"peak_lr": float("nan")}, "optim.peak_lr is nan"),
        (Optim, {"warmup_steps": -1}, "optim.warmup_steps is -1"),
        (Optim, {"b1": 1.0}, "optim.b1 is 1.0"),
        (Optim, {"b2": -0.1}, "optim.b2 is -0.1"),
        (Optim, {"weight_decay": -1.0}, "optim.weight_decay is -1.0"),
        (Optim, {"clip_norm": 0.0}, "optim.clip_norm is 0.0"),
        (Sampling, {"temperature": -1.0}, "sampling.temperature is -1.0"),
        (Sampling, {"top_p": 0.0}, "sampling.top_p is 0.0"),
        (Sampling, {"top_p": 1.1}, "sampling.top_p is 1.1"),
        (Sampling, {"top_k": -1}, "sampling.top_k is -1"),
        (Sampling, {"max_new_tokens": 0}, "sampling.max_new_tokens is 0"),
        (Buckets, {"prompt": ()}, "buckets.prompt is [], expected one size or more"),
        (Buckets, {"prompt": (512, 512)}, "buckets.prompt is [512, 512]"),
        (Buckets, {"completion": (512, 256)}, "buckets.completion is [512, 256]"),
        (Buckets, {"patches": (0, 16)}, "buckets.patches is [0, 16]"),
        (Buckets, {"patches": (16, 18)}, "buckets.patches has [18], expected multiples of 4"),
        (Sft, {"global_batch": 0}, "global_batch is 0, expected at least 1"),
        (Sft, {"limit": 0}, "limit is 0, expected at least 1"),
        (Mine, {"samples": 0}, "samples is 0, expected at least 1"),
        (Mine, {"keep": "mixed", "samples": 1}, "samples is 1 with keep: mixed, expected at least 2"),
        (Mine, {"sampling": Sampling(temperature=0.0)}, "sampling.temperature is 0 with samples 4"),
        (Rl, {"group_size": 1}, "group_size is 1, expected at least 2"),
        (Rl, {"sampling": Sampling(temperature=0.0)}, "sampling.temperature is 0"),
        (Rl, {"prompts_per_step": 500}, "prompts_per_step 500 is no multiple of prompts_per_update 256"),
        (Rl, {"rows": 100}, "prompts_per_update 256 is no multiple of rows 100"),
        (Rl, {"prompts": 0}, "prompts is 0, expected at least 1"),
        (Rl, {"mixed_share": 1.0}, "mixed_share is 1.0"),
        (Rl, {"epsilon": 0.0}, "epsilon is 0.0"),
        (Rl, {"std_epsilon": 0.0}, "std_epsilon is 0.0"),
        (Rl, {"beta": 0.0}, "beta is 0.0"),
        (Rl, {"beta": 1.5}, "beta is 1.5"),
        (Eval, {"prompts": 0}, "prompts is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(cls, values, message):
    with pytest.raises(ValueError) as error:
        cls(**values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_one_greedy_completion_an_item_can_be_mined():
    assert Mine(samples=1, sampling=Sampling(temperature=0.0)).samples == 1


def test_a_refused_setting_names_the_file(here):
    write(here, "group_size: 1", "rl.yaml")
    with pytest.raises(ConfigError, match="^rl.yaml: group_size is 1, expected at least 2"):
        load(Rl, "rl.yaml", [])


@pytest.mark.parametrize(
    "cls, args, words",
    [
        (Sft, ["--optim.peak-lrr", "1"], ["--optim.peak-lrr", "Perhaps you meant", "--optim.peak-lr"]),
        (Sft, ["--rows", "many"], ["--rows", "many"]),
        (Sft, ["--dtype", "float16"], ["float16", "bfloat16"]),
        (Window, ["--low", "3"], ["low 3 exceeds high 2"]),
        (Rl, ["--beta", "0"], ["beta is 0.0"]),
    ],
)
def test_a_wrong_flag_exits_with_2_and_says_why(capsys, cls, args, words):
    with pytest.raises(SystemExit) as exit:
        load(cls, None, args)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


@pytest.mark.parametrize("cls", STAGES)
def test_help_names_every_setting(capsys, cls):
    with pytest.raises(SystemExit) as exit:
        load(cls, None, ["--help"])
    assert exit.value.code == 0
    page = capsys.readouterr().out
    assert f"gvl {cls.__name__.lower()}" in page
    assert all(f"--{field.name.replace('_', '-')}" in page for field in fields(cls))


@pytest.mark.parametrize("cls", STAGES)
def test_a_dumped_config_loads_back_equal(tmp_path, cls):
    config = replace(cls(), model="läufe/1: #x")
    assert load(cls, write(tmp_path, dump(config)), []) == config


@settings(max_examples=40, deadline=None)
@given(st.floats(min_value=0), st.text(), st.lists(st.text()))
def test_any_value_survives_the_round_trip(tmp_path_factory, number, text, names):
    config = Sft(model=text, train=tuple(names), optim=Optim(weight_decay=number))
    path = tmp_path_factory.getbasetemp() / "roundtrip.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(Sft, str(path), []) == config

"""The bench: formulas against what XLA counts and what arrays weigh, counts, tables, and every case once."""

import io
import json
import os
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gvl_jax import cost
from gvl_jax.bench import cases, elsewhere, growth, inputs, run
from gvl_jax.bench.cases import CASES, OURS, PEER, TUNIX, Difference
from gvl_jax.bench.inputs import SIZES, Workload, World
from gvl_jax.cost import Work
from gvl_jax.decoding import Vocabulary, decode, empty_state
from gvl_jax.losses import token_logprobs
from gvl_jax.models.qwen_vl.attention import Prompt
from gvl_jax.models.qwen_vl.model import NOTHING, abstract_params, bind
from gvl_jax.types import Vision

SMALL = Workload(
    prompt=120, instruction=20, side=3, group_size=3, new=5, answer=7, forward_rows=2, samples=4, requests=6, verdict=4
)


def one_layer(width=256, vocabulary=512):
    """A layer of each kind: XLA counts the body of a scan once, however often it runs."""
    config = inputs._shape(width, 4 * width, 1, (4, 2), (1, width, 3 * width, 4), vocabulary=vocabulary)
    return replace(config, image_token_id=500, vision_start_token_id=501, vision_end_token_id=502)


def counted(function, *args) -> float:
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def near(formula: float, count: float) -> None:
    """Formulas leave out what is no matrix product: at these widths up to a few per cent, never a negative share."""
    assert 0.93 < formula / count <= 1.0


def test_prefill_flops_are_what_xla_counts():
    config, length = one_layer(), 600  # three blocks of queries, the last one smaller
    row = jnp.zeros((2, length), jnp.int32)

    def prefill(params):
        model = bind(config, params)
        x = model.embed(row)[:, None]
        return model.text.extend(x, jnp.zeros((3, 2, 1, length), jnp.int32), row[:, None] + 1, NOTHING)

    near(cost.prefill(config, 2, length).flops, counted(prefill, abstract_params(config)))


def test_flops_of_completions_on_a_shared_prompt_are_what_xla_counts():
    config, prompt, group, answer = one_layer(), 64, 4, 600
    text = config.text
    kept = jnp.zeros((1, text.num_key_value_heads, 1, prompt, text.head_dim))
    shared = Prompt(kept, kept, jnp.ones((1, prompt), bool), jnp.full((1,), prompt))
    tokens = jnp.zeros((1, group, answer), jnp.int32)
    own = cost.groups(config, 1, prompt, (), 0, group, answer).flops - cost.prefill(config, 1, prompt).flops
    near(
        own,
        counted(lambda params: bind(config, params).extend(tokens, shared), abstract_params(config)),
    )


def test_flops_of_a_decoded_token_are_what_xla_counts():
    config, prompt, group = one_layer(vocabulary=4096), 64, 4
    vocab = Vocabulary(jnp.zeros(4096, bool), jnp.zeros(4096, bool), jnp.zeros((10, 4096), jnp.uint8))
    state = jax.eval_shape(lambda: empty_state(config, 1, group, prompt, 1, 1))

    def step(params, state):
        return decode(params, None, state, vocab, None, 1.0, group, config=config, steps=1, greedy=True)

    near(cost.decode(config, 1, group, prompt, 1).flops, counted(step, abstract_params(config), state))


@pytest.mark.parametrize("full", [True, False])
def test_vision_flops_are_what_xla_counts(full, monkeypatch):
    # XLA counts the larger branch, whichever runs: here it sees the one that does
    monkeypatch.setattr(lax, "cond", lambda _, in_image, in_window, *a: (in_image if full else in_window)(*a))
    config, patches = one_layer(), 256
    vision = replace(config.vision, fullatt_block_indexes=(0,) if full else ())
    config = replace(config, vision=vision)
    numbers = np.arange(patches, dtype=np.int32)
    batch = Vision(
        np.zeros((patches, vision.frame_dim), np.uint8), np.zeros((patches, 2), np.int32), numbers * 0 + 1,
        numbers.reshape(-1, 64), numbers,
    )  # fmt: skip
    near(
        cost.vision_flops(vision, patches),
        counted(lambda params: bind(config, params).visual(batch, "float32"), abstract_params(config)),
    )


def test_a_training_step_is_three_forwards_and_the_head_four():
    config, length = one_layer(vocabulary=4096), 96
    row = jnp.zeros((1, length), jnp.int32)

    def layers(params):
        model, order = bind(config, params), jnp.zeros((3, 1, 1, length), jnp.int32)
        return model.text.extend(model.embed(row)[:, None], order, row[:, None] + 1, NOTHING)

    forward = cost.prefill(config, 1, length)
    near(
        cost.train(config, forward, 0, remat=False).flops,
        counted(jax.grad(lambda params: layers(params)[0].sum()), abstract_params(config)),
    )
    hidden, head = jnp.zeros((length, 256)), jnp.zeros((256, 4096))
    near(
        cost.HEAD_TRAIN * cost.head_flops(config.text, length),
        counted(jax.value_and_grad(lambda pair: token_logprobs(*pair, row[0]).sum()), (hidden, head)),
    )


def test_kv_bytes_are_those_of_the_samplers_arrays():
    config, prompt, group, new = SIZES["tiny"], 30, 4, 6
    for one in (config, replace(config, dtype="bfloat16")):
        state = jax.eval_shape(lambda one=one: empty_state(one, 1, group, prompt, new, new))
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.prompts, state.caches)))
        assert cost.rollout(one, prompt, (), group, new, shared=True).kv_bytes == kept
    assert cost.kv_bytes(replace(SIZES["3B"], dtype="bfloat16"), 1) == 36 * 2**10  # known of the real model


def test_a_group_costs_its_prompt_once_or_once_each():
    config, P, R, G = SIZES["tiny"], 40, 9, 5
    assert cost.rollout(config, P, (36,), G, R, shared=True).tokens == P + G * R
    assert cost.rollout(config, P, (36,), G, R, shared=False).tokens == G * (P + R)
    assert cost.update(config, P, (36,), G, R, shared=True, remat=False).tokens == P + G * R
    assert cost.update(config, P, (36,), G, R, shared=False, remat=False).tokens == G * (P + R)
    one = [cost.update(config, P, (36,), 1, R, shared=way, remat=True) for way in (True, False)]
    assert one[0] == one[1]


def test_names_of_the_sizes_are_their_parameters_without_embeddings():
    real = {"3B": (3.75e9, 3.4e9), "7B": (8.29e9, 7.2e9)}  # with and without embeddings, of the published models
    for name, config in SIZES.items():
        body, vocabulary = inputs.parameters(config)
        assert config.text.vocab_size >= 151_936
        if name.endswith("M"):
            assert abs(body / 1e6 / int(name[:-1]) - 1) < 0.05
        elif name in real:
            assert abs((body + vocabulary) / real[name][0] - 1) < 0.01 and abs(body / real[name][1] - 1) < 0.05


def test_inputs_are_laid_out_like_real_prompts():
    world = World(SIZES["tiny"], None, SMALL)
    prompt = inputs.prompts(world, 1)[0]
    shared = world.layout.shared
    assert len(shared) == SMALL.instruction and tuple(prompt.tokens[: len(shared)]) == shared
    assert len(prompt.tokens) == SMALL.prompt and (prompt.tokens == world.config.image_token_id).sum() == 9
    assert len(prompt.patches) == SMALL.patches == 36
    learned = sum(e.loss_mask.sum() for e in inputs.sft_samples(world))
    assert abs(learned / sum(len(e.tokens) for e in inputs.sft_samples(world)) - 0.25) < 0.01
    assert [len(e.grids) for e in inputs.requests(world)] == [0, 1] * (SMALL.requests // 2)
    with pytest.raises(ValueError, match="a sample of 25 tokens cannot hold 39"):
        inputs.example(world, 0, 25, picture=True)


def line(side, *seconds):
    rate = run.Rate(1e9, 1e9)
    return run.Line("rollout", side, seconds, (4.0,), (3, 0), 2**30, rate, Work(1216, 5e8, 2**20, 1e8), 0.125)


def test_the_table_shows_medians_ranges_and_ratios_to_ours():
    lines = [line(OURS, 1.0, 2.0, 9.0), line(PEER, 8.0, 6.0, 27.0)]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in run.table(lines).splitlines()]
    assert rows[2] == [
        "rollout",
        "ours",
        "2 (1–9)",
        "1.00",
        "4",
        "1,024",
        "1,216",
        "0",
        "1.0",
        "12%",
        "3 + 0",
        "25%",
        "5%",
    ]
    assert rows[3][:4] == ["rollout", "transformers", "8 (6–27)", "4.00"] and rows[3][10] == "—"
    assert run.ratio_text(lines[1], lines[0]) == "  ours is 4.00x as fast as transformers (3.00 to 8.00)"
    assert run.speed_text(lines[1], 54) == "  transformers: 6.75 new tokens/s (2 to 9)"


def test_a_difference_over_its_tolerance_is_said_and_fails(capsys, monkeypatch):
    side = SimpleNamespace(build=lambda: lambda: 1, proof=None)
    case = SimpleNamespace(compare=lambda world, a, b: [Difference("logits", 0.5, 0.1)])
    found = run.compare(None, case, {OURS: side, PEER: side})
    assert found == [Difference("logits", 0.5, 0.1)]
    assert capsys.readouterr().out == "  transformers: DIFFERENT: logits 0.5, at most 0.1 allowed\n"
    monkeypatch.setattr(run, "world", lambda *_: None)
    monkeypatch.setattr(run, "_measure", lambda *_: ([line(OURS, 1.0)], found))
    assert run.main(["--only", "forward"]) == 1


def test_growth_tables_hold_the_formulas():
    text = growth.tables(SIZES["20M"], Workload())
    assert text.count("By ") == 5
    row = next(row for row in text.splitlines() if row.startswith("| 16 "))
    shared, repeated = (
        cost.update(SIZES["20M"], 1000, (1296,), 16, 250, shared=way, remat=False).flops for way in (True, False)
    )
    assert row.split("|")[8].strip() == f"{repeated / shared:.2f}"
    assert "| 1.00  |" in next(row for row in text.splitlines() if re.match(r"\| 1 +\| 0", row))


def test_without_torch_its_lines_are_left_out_with_a_note(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "_rate", lambda side, dtype: run.Rate(1.0, 1.0))
    monkeypatch.setattr(run, "_peak_in_child", lambda *args: None)
    once = {OURS: ((1.0,), (1.0,))}, {OURS: (1, 0)}
    monkeypatch.setattr(run, "_alternate", lambda *_: once)
    lines = bench(tmp_path, "forward")
    assert "left out" in capsys.readouterr().out
    assert [one["side"] for one in lines] == [OURS]


def in_another_process(monkeypatch, folder, answers):
    """A script in place of tunix's; each line asked finds what `answers` says, of the job and the line."""
    script = folder / "script.py"
    lines = "\njob = json.loads(input())\nprint('null', flush=True)\nfor line in sys.stdin:\n    "
    script.write_text(f"import json, os, sys{lines}print({answers}, flush=True)\n")
    monkeypatch.setattr(elsewhere, "SCRIPT", script)
    prompt = inputs.example(World(SIZES["tiny"], None, SMALL), 0, 30, picture=False)
    return elsewhere.job(World(SIZES["tiny"], folder, SMALL), prompt, 3, 1.2)


def test_a_process_elsewhere_answers_until_it_is_let_go(monkeypatch, tmp_path):
    told = (
        "[[os.getpid(), job['count'], job['new'], len(job['prompt']), job['forbidden'][0]]] if line == 'run\\n' else 7"
    )
    job = in_another_process(monkeypatch, tmp_path, told)
    step = elsewhere.generate(sys.executable, job)
    ((pid, *rest),) = step().tolist()
    assert rest == [3, SMALL.new, 30, inputs.TEXT_IDS] and step().tolist() == [[pid, *rest]]
    del step
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert elsewhere.peak_bytes(sys.executable, job) == 7


def test_a_process_elsewhere_that_dies_says_why(monkeypatch, tmp_path):
    job = in_another_process(monkeypatch, tmp_path, "sys.exit('no memory')")
    with pytest.raises(RuntimeError, match="the process of google-tunix ended: no memory"):
        elsewhere.generate(sys.executable, job)()
    with pytest.raises(ValueError, match="no google-tunix at /none/python.*expected the python of an environment"):
        run.main(["--tunix-python", "/none/python"])


def test_the_text_case_counts_a_prompt_once_or_for_each_completion():
    config, P, R, G = SIZES["tiny"], SMALL.prompt, SMALL.new, SMALL.group_size
    sides = cases.text_rollout(World(config, None, SMALL), python="", versions="", temperature=1.2).sides
    assert sides[OURS].work.tokens == P + G * R and sides[TUNIX].work.tokens == G * (P + R)
    assert sides[TUNIX].work.flops > cost.rollout(config, P, (), G, R, shared=False).flops


def test_an_unknown_case_is_named():
    with pytest.raises(ValueError, match="unknown case roll; expected some of forward, rollout"):
        run.main(["--only", "roll"])


def bench(folder, names, size="tiny"):
    sizes = [word for name, value in SMALL._asdict().items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert (
        run.main(["--size", size, "--only", names, "--repeats", "1", "--json", str(folder / "out.json"), *sizes]) == 0
    )
    return json.loads((folder / "out.json").read_text())["lines"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All cases in one run: what it printed of each, and their lines."""
    from gvl_jax.bench import theirs

    said, peak = io.StringIO(), run._peak_in_child

    def peak_of_one(place, name, *rest):
        """A process of its own for each side takes seconds: one case has them."""
        return peak(place, name, *rest) if name == "forward" else None

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(run, "_rate", lambda side, dtype: run.Rate(1.0, 1.0))
        patch.setattr(theirs, "settle", lambda step: 1)  # which number of threads is fastest proves nothing here
        patch.setattr(run, "_peak_in_child", peak_of_one)
        lines = bench(tmp_path_factory.mktemp("measured"), ",".join(CASES))
    return said.getvalue().split("\n\n"), lines


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_both_sides_of_a_case_agree_and_are_measured(name, measured):
    (said,) = [part for part in measured[0] if part.startswith(f"{name}: ")]
    lines = [one for one in measured[1] if one["case"] == name]
    assert "equal" in said and "DIFFERENT" not in said
    assert [one["side"] for one in lines][0] == OURS and len(lines) >= 2
    for one in lines:
        assert one["compiles"][1] == 0 and len(one["seconds"]) == 1
        assert name != "forward" or one["peak_bytes"] > 100 * 2**20


@pytest.mark.slow
def test_torch_gets_the_number_of_threads_that_is_fastest():
    import torch

    from gvl_jax.bench import theirs

    tried, before = [], torch.get_num_threads()
    try:
        assert theirs.settle(lambda: tried.append(torch.get_num_threads())) == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert sorted(set(tried)) == sorted({1, os.cpu_count()})

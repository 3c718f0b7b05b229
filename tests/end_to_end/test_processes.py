"""Several processes, as on the hosts of a pod, make what one makes; and what is killed goes on."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny_models import write_checkpoint

from gvl_jax.cli import LOST
from gvl_jax.data import embedded

pytestmark = pytest.mark.slow

COMMON = {
    "dtype": "float32",
    "images": {"min_pixels": 784, "max_pixels": 3136},
    "buckets": {"prompt": [640], "completion": [16], "patches": [256]},
}
SFT = COMMON | {"epochs": 1, "global_batch": 8, "rows": 1, "max_length": 900, "save_every": 2, "limit": 28}
SFT |= {"optim": {"peak_lr": 1e-3}}
MINE = COMMON | {"samples": 2, "keep": "any_wrong", "size": 16, "prompts": 2, "limit": 17}
MINE |= {"sampling": {"max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0}}
RL = COMMON | {"group_size": 4, "prompts_per_step": 8, "prompts_per_update": 4, "prompts": 1, "max_length": 200}
RL |= {"mixed_share": 0.0, "save_every": 1, "sampling": {"max_new_tokens": 16}, "optim": {"peak_lr": 1e-3}}
EVAL = COMMON | {"prompts": 2, "sampling": {"temperature": 0, "max_new_tokens": 16}}


COMMANDS = "import json, sys; from gvl_jax.cli import main; sys.exit(max(main(c) for c in json.loads(sys.argv[1])))"


def start(*commands: tuple[str, Path], processes: int = 1, devices: int = 1) -> list[subprocess.Popen]:
    """`gvl VERB CONFIG`, one command after the other, in so many processes, each with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", COMMANDS, json.dumps([(verb, str(config)) for verb, config in commands])],
            env=environment | (together | {"JAX_PROCESS_ID": str(number)} if processes > 1 else {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip


def finish(running: list[subprocess.Popen]) -> None:
    said = [one.communicate(timeout=900)[0] for one in running]
    assert not any(one.returncode for one in running), "\n".join(said)


def write(folder: Path, name: str, settings: dict) -> Path:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | {"output": str(folder / name)}))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    embedded.write(folder / "data", train=(12, 8, 12), heldout=(4, 3, 4))
    text = (folder / "data" / "train.jsonl").read_text()
    return folder, {"model": str(write_checkpoint(folder, text, 700))}


@pytest.fixture(scope="module")
def alone(world):
    """SFT, RL and evaluation in one process with one device."""
    folder, base = world
    given = base | {"train": [str(folder / "data" / "train.jsonl")]}
    heldout = base | {"data": [str(folder / "data" / "heldout.jsonl")]}
    stages = {"sft": SFT | given, "rl": RL | given, "eval": EVAL | heldout}
    finish(start(*((verb, write(folder, f"{verb}_alone", settings)) for verb, settings in stages.items())))
    return folder, given, heldout


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "model" / "model.safetensors")


def assert_close(run: Path, other: Path) -> None:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    worst = max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)
    assert worst < 1e-5, worst


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def assert_same_sft(run: Path, other: Path) -> None:
    assert_close(run, other)
    ours, theirs = ([row["train/loss"] for row in logged(one)] for one in (run, other))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_sft_of_four_processes_makes_the_model_of_one(alone):
    folder, given, _ = alone
    config = write(folder, "sft_4", SFT | given | {"mesh": {"fsdp": 2}})
    finish(start(("sft", config), processes=4))
    assert_same_sft(folder / "sft_4", folder / "sft_alone")


@pytest.fixture(scope="module")
def together(alone):
    """RL and evaluation by two processes of two devices; a weight of RL lies on all four."""
    folder, given, heldout = alone
    training = write(folder, "rl_2", RL | given | {"mesh": {"fsdp": 4}})
    finish(start(("rl", training), ("eval", write(folder, "eval_2", EVAL | heldout)), processes=2, devices=2))
    return folder


def test_rl_of_two_processes_makes_the_model_of_one(together):
    assert_close(together / "rl_2", together / "rl_alone")
    for a, b in zip(logged(together / "rl_alone"), logged(together / "rl_2"), strict=True):
        for name in ("reward/total", "rollout/tokens", "train/loss", "train/clip", "train/ratio", "rollout/f1_request"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


def test_evaluation_by_two_processes_of_two_devices_writes_what_one_writes(together):
    for result in ("scores.json", "samples.jsonl"):
        assert (together / "eval_2" / result).read_bytes() == (together / "eval_alone" / result).read_bytes()


def test_a_process_that_dies_ends_the_job_and_the_same_command_goes_on_to_the_model_of_one(alone):
    folder, given, _ = alone
    config = write(folder, "sft_died", SFT | given | {"mesh": {"fsdp": 2}})
    running = start(("sft", config), processes=2)
    checkpoints = folder / "sft_died" / "checkpoints"
    while not (checkpoints / "2").exists():
        assert running[0].poll() is None, running[0].communicate()[0]
        time.sleep(0.05)
    running[1].kill()
    (said, _), code = running[0].communicate(timeout=900), running[0].returncode
    assert code == LOST and "another process has gone" in said.strip().splitlines()[-1], said
    finish(start(("sft", config), processes=2))
    assert_same_sft(folder / "sft_died", folder / "sft_alone")


KILLS = int(os.environ.get("GVL_KILLS", "0"))


@pytest.mark.skipif(not KILLS, reason="minutes of killing, by hand: GVL_KILLS=10 pytest -k random_moments")
@pytest.mark.parametrize("verb", ["sft", "mine", "rl"])
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bits(alone, verb):
    folder, given, _ = alone
    settings = {"sft": SFT, "mine": MINE, "rl": RL}[verb] | given
    whole, name = folder / f"{verb}_alone", f"{verb}_killed"
    if verb == "mine":
        whole = folder / "mine_whole"
        finish(start((verb, write(folder, "mine_whole", settings))))
    rng, config, kills, last = np.random.default_rng(0), write(folder, name, settings), 0, False
    while not last:
        last = kills == KILLS  # this one goes to its end
        (running,) = start((verb, config))
        while not last and running.poll() is None and not (folder / name).exists():  # it begins
            time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            running.wait(200 if last else rng.uniform(0, 12))
        if running.poll() is None:
            running.kill()
            running.communicate()
            kills += 1
            continue
        finish([running])
        for result in ("hard.jsonl",) if verb == "mine" else ("model/model.safetensors", "samples.jsonl"):
            if (whole / result).exists():
                assert (folder / name / result).read_bytes() == (whole / result).read_bytes(), result
        if not last:
            shutil.rmtree(folder / name)  # it ended before it was killed: the next kill shall hit a run, not a ruin
    assert kills == KILLS

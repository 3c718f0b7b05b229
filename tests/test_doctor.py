"""Each thing that can be wrong with a machine is found, with the command that removes it; nothing hangs or leaks."""

import json
import os
import shutil
import subprocess
import sys
from email.utils import formatdate
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_models import write_checkpoint

from gvl_jax import doctor, machine
from gvl_jax.cli import main
from gvl_jax.data.corpora import open_corpus
from gvl_jax.data.prepared import prepare
from gvl_jax.doctor import Check

GB = 10**9
VERSIONS, REQUIRES = machine.installed()
JAX = ["jaxlib<=0.10.2,>=0.10.1", "numpy>=2.0"] + [  # as jax's metadata has it
    'libtpu==0.0.42.*; extra == "tpu"',
    'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
    'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"',
]
PLAIN = {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6"}
CPU = {"backend": "cpu", "kind": "cpu", "here": 1, "devices": 1, "process": 0, "processes": 1, "bytes": None}
CPU |= {"stderr": "An NVIDIA GPU may be present. Falling back to cpu."}
HUNG = {"error": "does not answer for 60 s"}
TPU = CPU | {"backend": "tpu", "kind": "TPU v5p", "here": 4, "devices": 16, "processes": 4, "bytes": 95 * GB}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("doctor"), "Is it harmful?", 300)


# ------------------------------------------------------------------------------------------------------------ packages


def test_this_environment_is_found_to_fit():
    assert [check.status for check in doctor.check_packages(VERSIONS, REQUIRES["gvl-jax"])] == ["ok"]
    assert doctor.check_jax(VERSIONS, REQUIRES["jax"], "").status == "ok"


@pytest.mark.parametrize(
    "change, found, fix",
    [
        ({"pillow": "12.2.0"}, "pillow: 12.2.0, expected >=12.3", 'python -m pip install "pillow>=12.3"'),
        ({"flax": None}, "flax: not installed, expected >=0.12.8", 'python -m pip install "flax>=0.12.8"'),
        ({"transformers": "4.57.1"}, "4.57.1, expected <6,>=5.20", 'python -m pip install "transformers<6,>=5.20"'),
        ({"transformers": "6.0.0"}, "6.0.0, expected <6,>=5.20", 'python -m pip install "transformers<6,>=5.20"'),
        ({"jax": "0.13.0"}, "jax: 0.13.0, expected <0.13,>=0.10", 'python -m pip install "jax<0.13,>=0.10"'),
        ({"orbax-checkpoint": "0.11.9"}, "0.11.9, expected >=0.12", 'pip install "orbax-checkpoint>=0.12"'),
        ({"python": "3.10.4"}, "python: 3.10.4, expected >=3.11", "python3.12 -m venv .venv"),
    ],
)
def test_a_package_outside_pyprojects_range_is_named_with_the_command_that_installs_one_inside(change, found, fix):
    versions = {name: version for name, version in (VERSIONS | change).items() if version}
    (check,) = doctor.check_packages(versions, REQUIRES["gvl-jax"])
    assert check.status == "problem" and found in check.found and fix in check.fix


def test_torch_is_not_asked_for():
    versions = {name: version for name, version in VERSIONS.items() if name != "torch"}
    assert [check.status for check in doctor.check_packages(versions, REQUIRES["gvl-jax"])] == ["ok"]


def test_a_package_that_a_broken_pip_left_without_a_name_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "~ax-0.9.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.installed()[0]["jax"] == VERSIONS["jax"]


@pytest.mark.parametrize(
    "change, extra, found, fix",
    [
        ({"jaxlib": "0.10.0"}, "", "jaxlib: 0.10.0, expected", 'pip install -U "jax==0.10.2"'),
        ({"jaxlib": "0.10.3"}, "", "jaxlib: 0.10.3, expected", 'pip install -U "jax==0.10.2"'),
        ({}, "tpu", "libtpu: not installed, expected ==0.0.4", 'pip install -U "jax[tpu]==0.10.2"  # not libtpu alone'),
        ({"libtpu": "0.0.44.1"}, "tpu", "libtpu: 0.0.44.1, expected", 'pip install -U "jax[tpu]==0.10.2"'),
        ({}, "cuda13", "jax-cuda13-plugin: not installed", 'pip install -U "jax[cuda13]==0.10.2"'),
        ({"jax-cuda12-plugin": "0.9.1"}, "cuda12", "0.9.1, expected <=0.10.2", 'pip install -U "jax[cuda12]==0.10.2"'),
        (
            {"jax-cuda12-plugin": "0.10.2", "jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"},
            "cuda12",
            "jax-cuda13-plugin, jax-cuda13-pjrt: expected cuda12 alone",
            "pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && python -m pip install -U",
        ),
    ],
)  # fmt: skip
def test_what_drives_the_accelerator_has_to_fit_jax(change, extra, found, fix):
    check = doctor.check_jax(PLAIN | change, JAX, extra)
    assert check.status == "problem" and found in check.found and fix in check.fix


@pytest.mark.parametrize(
    "more, extra", [({}, ""), ({"libtpu": "0.0.42.1"}, "tpu"), ({"jax-cuda13-plugin": "0.10.2"}, "cuda13")]
)
def test_versions_that_fit_jax_are_fine(more, extra):
    check = doctor.check_jax(PLAIN | more, JAX, extra)
    assert check.status == "ok" and all(name in check.found for name in more)


@pytest.mark.parametrize(
    "versions, tpu, gpu, driver, extra",
    [
        ({}, False, False, "", ""),
        ({}, True, True, "", "tpu"),
        ({}, False, True, "", "cuda13"),
        ({}, False, True, "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27", "cuda13"),
        ({}, False, True, "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5", "cuda12"),
        ({"jax-cuda12-plugin": "0.10.2"}, False, True, "Kernel Module  580.65.06", "cuda12"),
    ],
)
def test_the_extra_of_jax_fits_device_and_driver(versions, tpu, gpu, driver, extra):
    assert machine.jax_extra(versions, tpu, gpu, driver) == extra


# ------------------------------------------------------------------------------------------------------------- devices


def test_device_files_of_accelerators_are_told_from_others(tmp_path):
    dev, groups = tmp_path / "dev", tmp_path / "sys/kernel/iommu_groups"
    (dev / "vfio").mkdir(parents=True)
    (dev / "accel").mkdir()  # of laptops' NPUs: /dev/accel/accel0
    for name in ("accel0", "accel1", "accel/accel0", "vfio/0", "vfio/7", "vfio/vfio", "nvidia0", "nvidiactl", "dxg"):
        (dev / name).touch()
    for group, vendor in (("0", "0x1ae0"), ("7", "0x8086")):
        (groups / group / "devices/0000:00:04.0").mkdir(parents=True)
        (groups / group / "devices/0000:00:04.0/vendor").write_text(f"{vendor}\n")
    assert machine.tpu_files(dev, tmp_path / "sys") == [str(dev / name) for name in ("accel0", "accel1", "vfio/0")]
    assert machine.gpu_files(dev) == [str(dev / name) for name in ("dxg", "nvidia0")]


def fake_process(proc: Path, pid: str, opens: str, command: str) -> None:
    (proc / pid / "fd").mkdir(parents=True)
    (proc / pid / "fd/3").symlink_to(opens)
    (proc / pid / "comm").write_text(command.split()[0] + "\n")
    (proc / pid / "cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")


@pytest.mark.parametrize("opened", ["/dev/accel0", "/dev/vfio/0", "lockfile"])
def test_the_process_that_holds_a_tpu_is_named_and_its_secrets_are_not(opened, tmp_path):
    lockfile = tmp_path / "lockfile"
    fake_process(tmp_path / "proc", "41", "/dev/null", "bash")
    fake_process(tmp_path / "proc", "42", str(tmp_path / opened), "python3 train.py --hf-token s3cret --steps 5")
    check = doctor.check_tpu_lock(["/dev/accel0", "/dev/vfio/0"], tmp_path / "proc", lockfile)
    assert check.status == "problem" and check.fix == "kill 42"
    assert "process 42 (python3: python3 train.py --hf-token *** --steps 5)" in check.found


def test_a_real_process_that_has_the_lockfile_open_is_found(tmp_path):
    lockfile = tmp_path / "lockfile"
    code = "import sys; f = open(sys.argv[1], 'w'); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(lockfile)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        check = doctor.check_tpu_lock([], Path("/proc"), lockfile)
        process.stdin.close()
    assert check.fix == f"kill {process.pid}" and f"held by process {process.pid} (" in check.found


def test_a_lockfile_that_nobody_holds_is_to_be_removed(tmp_path):
    (tmp_path / "proc").mkdir()
    lockfile = tmp_path / "libtpu_lockfile"
    assert doctor.check_tpu_lock([], tmp_path / "proc", lockfile).status == "ok"
    lockfile.touch()
    check = doctor.check_tpu_lock([], tmp_path / "proc", lockfile)
    assert (check.status, check.fix) == ("warning", f"sudo rm {lockfile}")


def test_processes_that_may_not_be_looked_into_are_counted(tmp_path, monkeypatch):
    fake_process(tmp_path, "42", "/dev/accel0", "python3 train.py")

    def refuse(link):
        raise PermissionError

    monkeypatch.setattr(os, "readlink", refuse)
    check = doctor.check_tpu_lock(["/dev/accel0"], tmp_path, tmp_path / "none")
    assert check.status == "ok" and "1 of other users cannot be seen: sudo gvl doctor" in check.found


@pytest.mark.parametrize(
    "said, files, env, found, fix",
    [
        (CPU, ["/dev/accel0"], {"JAX_PLATFORMS": "cpu"}, "on the CPU, /dev shows /dev/accel0", "unset JAX_PLATFORMS"),
        (CPU, ["/dev/nvidia0"], {"CUDA_VISIBLE_DEVICES": ""}, "/dev/nvidia0", "unset CUDA_VISIBLE_DEVICES"),
        (CPU, ["/dev/nvidia0"], {}, "Falling back to cpu.", "pip install jax[it]"),
        (HUNG, ["/dev/accel0"], {}, "for 60 s; /dev shows /dev/accel0", "--worker=all"),
        (HUNG, ["/dev/vfio/0"], {"GVL_DISTRIBUTED": "1"}, "60 s", "unset GVL_DISTRIB"),
        (HUNG, ["/dev/nvidia0"], {}, "does not answer", "JAX_PLATFORMS=cpu gvl doctor"),
        ({"error": "Unknown flag in XLA_FLAGS: --x"}, [], {"XLA_FLAGS": "--x"}, "--x", "unset XLA_FLAGS"),
        (
            {"error": "Unable to initialize backend 'tpu': no libtpu"},
            [],
            {"JAX_PLATFORMS": "tpu"},
            "does not start: Unable",
            "unset JAX_PLATFORMS",
        ),
        ({"error": "The TPU is already in use by process with pid 42. Not"}, ["/dev/accel0"], {}, "in use", "kill 42"),
        ({"error": "RuntimeError: odd"}, [], {}, "does not start: RuntimeError: odd", "import jax; jax.devices()"),
    ],
)  # fmt: skip
def test_devices_that_are_not_used_are_a_problem_with_its_cause(said, files, env, found, fix):
    check = doctor.check_devices(said, files, env, "pip install jax[it]")
    assert check.status == "problem" and found in check.found and fix in check.fix


@pytest.mark.parametrize(
    "said, files, found",
    [
        (CPU, [], "cpu: 1 × cpu here, 1 in all, process 0 of 1"),
        (TPU, ["/dev/accel0"], "tpu: 4 × TPU v5p of 95.0 GB here, 16 in all, process 0 of 4"),
    ],
)
def test_devices_in_use_are_counted(said, files, found):
    assert doctor.check_devices(said, files, {"JAX_PLATFORMS": ""}, "") == Check("devices", "ok", found)


def test_what_hangs_is_killed_and_reported(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **keys: started.append(popen(*args, **keys)) or started[0])
    said = machine.ask("import time; time.sleep(600)", os.environ, 0.2)
    assert said == {"error": "does not answer for 0.2 s"} and started[0].returncode == -9
    assert doctor.check_devices(said, [], {}, "").status == "problem"


def test_what_fails_says_its_last_line():
    assert machine.ask("raise ValueError('too bad')", os.environ, 60) == {"error": "ValueError: too bad"}
    assert machine.ask("import os; os._exit(3)", os.environ, 60) == {"error": "exit code 3"}


def test_a_module_of_the_working_directory_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "gvl_jax.py").write_text("raise ValueError('not this one')")
    monkeypatch.chdir(tmp_path)
    assert machine.ask("print('{}')", os.environ, 60) == {"stderr": ""}


def test_only_the_last_line_that_is_printed_counts():
    call = "import sys; print('a banner'); print('{\"a\": 1}'); print('careful', file=sys.stderr)"
    assert machine.ask(call, os.environ, 60) == {"a": 1, "stderr": "careful"}


# ------------------------------------------------------------------------------------------------------------- machine


def fake_host(folder: Path, groups: str, limits: dict[str, str]) -> tuple[int, float]:
    for name, text in {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2000000 kB\n",
        "proc/self/cgroup": groups,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, text in limits.items():
        (folder / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup" / name).write_text(text)
    return machine.host_memory(folder / "proc", folder / "cgroup")


@pytest.mark.parametrize(
    "groups, limits, limit",
    [
        ("0::/\n", {}, float("inf")),
        ("0::/\n", {"memory.max": "max\n"}, float("inf")),
        ("0::/job/step\n", {"memory.max": "max\n", "job/memory.max": "5000\n", "job/step/memory.max": "max\n"}, 5000),
        ("4:memory:/docker/a\n3:cpu:/b\n0::/\n", {"memory/memory.limit_in_bytes": "7000\n"}, 7000),
        ("0::/job\n", {"job/memory.max": "9000\n", "job/memory.stat": "anon 8000\nfile 500\n"}, 1000),
        (
            "4:memory:/\n",
            {"memory/memory.limit_in_bytes": "9000", "memory/memory.stat": "rss 1\ntotal_rss 2000\n"},
            7000,
        ),
    ],
)
def test_memory_is_what_is_free_and_what_the_cgroups_leave(groups, limits, limit, tmp_path):
    assert fake_host(tmp_path, groups, limits) == (2_000_000 * 1024, limit)


def test_a_small_host_is_warned_of():
    assert doctor.check_memory(64 * GB, float("inf")) == Check("host memory", "ok", "64.0 GB free")
    check = doctor.check_memory(64 * GB, 4 * GB)
    assert check.status == "warning" and "the cgroup leaves 4.0 GB" in check.found and check.fix.startswith("ps ")


def test_a_folder_needs_room_and_leave_to_write(tmp_path, monkeypatch):
    new = tmp_path / "not" / "yet"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(GB, 0, 20 * GB))
    assert doctor.check_folder("output", str(new), 10 * GB, "move") == Check("output", "ok", f"20.0 GB free at {new}")
    assert doctor.check_folder("output", str(new), 30 * GB, "move")[1:] == ("warning", f"20.0 GB free at {new}", "move")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(GB, GB, 5 * 10**8))
    assert doctor.check_folder("output", str(new), GB, "move")[1:] == ("problem", f"0.5 GB free at {new}", "move")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    check = doctor.check_folder(
        "compile cache", str(tmp_path / "file" / "xla"), GB, "export JAX_COMPILATION_CACHE_DIR=DIR"
    )
    assert check.status == "problem" and f"{tmp_path / 'file'} cannot be written to: Not a directory" in check.found
    assert check.fix == "export JAX_COMPILATION_CACHE_DIR=DIR"


def test_no_compile_cache_is_warned_of_and_a_bucket_is_not_looked_into():
    assert doctor.check_folder("compile cache", "", GB, "export it")[1:] == ("warning", "none", "export it")
    assert doctor.check_folder("output", "gs://b/run", GB, "") == Check("output", "ok", "gs://b/run")


def test_a_bucket_needs_gcsfs():
    check = doctor.check_buckets({}, ["runs", "gs://b/run"])
    assert check == Check("gs://", "problem", "gs://b/run needs gcsfs", "python -m pip install gcsfs")
    assert doctor.check_buckets({}, ["runs"]).status == "ok"
    assert doctor.check_buckets({"gcsfs": "2026.9"}, ["gs://b/run"]).status == "ok"


def test_a_clock_that_is_off_is_a_problem():
    now = 1_800_000_000.0
    for installed_at, date in ((now + 10 * 86400, None), (now - 60, formatdate(now + 3600, usegmt=True))):
        check = doctor.check_clock(now, installed_at, date)
        assert (check.status, check.fix) == ("problem", "sudo timedatectl set-ntp true")
    assert doctor.check_clock(now, now - 60, formatdate(now + 30, usegmt=True)).status == "ok"


def test_a_hub_out_of_reach_is_a_warning():
    assert doctor.check_hub("https://hub", None)[1:] == (
        "warning", "HF_HUB_OFFLINE is set: nothing is fetched", "unset HF_HUB_OFFLINE",
    )  # fmt: skip
    check = doctor.check_hub("https://hub", {"error": "does not answer for 3 s"})
    assert check.status == "warning" and "does not answer for 3 s" in check.found and check.fix == "curl -I https://hub"
    assert doctor.check_hub("https://hub", {"date": None}).status == "ok"


# ----------------------------------------------------------------------------------------------------- data and model


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    "lines, found, fix",
    [
        ('{"request": "Hi"}\n{"request": 5}', "line 2: key 'request': got 5", "sed -n 2p {}"),
        ('{"request": "Hi", "images": ["b.png"]}', "no such file", "ls -l {}/b.png"),
        ('{"request": "Hi", "images": ["broken.png"]}', "image rejected", "ls -l {}/broken.png"),
        ("", "holds no records", "ls -l {}"),
    ],
)
def test_data_that_a_stage_would_stop_at_is_found(lines, found, fix, data):
    data.write_text(lines)
    check = doctor.check_data(data)
    place = data.parent if "png" in fix else data
    assert check.status == "problem" and found in check.found and fix.format(place) in check.fix


def test_data_that_is_not_there_is_found(tmp_path):
    check = doctor.check_data(tmp_path / "none.jsonl")
    assert check.status == "problem" and "no such records file" in check.found


def test_good_data_is_counted(data):
    data.write_text('{"request": "Hi", "images": ["a.png", "a.png"]}\n{"request": "Hi"}')
    assert doctor.check_data(data) == Check("data", "ok", "2 records; the 2 pictures of the first 100 open")


def test_a_prepared_data_set_is_looked_into(data):
    data.write_text('{"id": "a", "request": "Hi", "images": ["a.png"]}\n{"id": "b", "request": "Hi"}\n')
    folder = data.parent / "prepared"
    prepare(open_corpus("jsonl", str(data)), folder)
    assert doctor.check_data(folder) == Check("data", "ok", "2 records; the 1 pictures of the first 100 open")
    (shard,) = folder.glob("*.array_record*")
    shard.write_bytes(b"")
    check = doctor.check_data(folder)
    assert (check.status, check.fix) == ("problem", f"gvl data verify {folder}")


def test_a_whole_model_says_what_training_it_takes(model):
    check = doctor.check_model(str(model), 0)
    count = sum(array.size for array in load_file(model / "model.safetensors").values())
    assert check.status == "ok" and f"to train: {12 * count / GB:.3g} GB" in check.found
    assert doctor.check_model(str(model), 16 * count).status == "ok"
    check = doctor.check_model(str(model), 16 * count - 1)
    assert check.status == "warning" and check.fix == "--trained language, or more devices"


@pytest.mark.parametrize(
    "lost, found",
    [
        ("config.json", "config.json does not exist"),
        ("tokenizer.json", "expected tokenizer.json"),
        ("model.safetensors", "found: no weights"),
    ],
)
def test_a_model_without_one_of_its_files_is_a_problem(lost, found, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / lost).unlink()
    check = doctor.check_model(str(copy), 0)
    assert check.status == "problem" and found in check.found
    assert check.fix == f"hf download OWNER/NAME --local-dir {copy}"


def test_a_cut_download_is_named(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    os.truncate(copy / "model.safetensors", (copy / "model.safetensors").stat().st_size - 1)
    check = doctor.check_model(str(copy), 0)
    assert check.status == "problem" and "model.safetensors" in check.found


def test_a_model_that_lacks_tensors_is_a_problem(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file({key: array for key, array in tensors.items() if key != name}, copy / "model.safetensors")
    check = doctor.check_model(str(copy), 0)
    assert check.status == "problem" and "lacks 1 tensors, the first: model.embed_tokens.weight" in check.found


def test_a_model_that_is_nowhere_is_a_problem(tmp_path):
    check = doctor.check_model(str(tmp_path / "none"), 0)
    assert check.status == "problem" and "is not a directory" in check.found
    check = doctor.check_model("no-such-owner/no-such-model", 0)
    assert check.status == "problem" and check.fix == "hf auth login && hf download no-such-owner/no-such-model"


# ------------------------------------------------------------------------------------------------------------ the verb


@pytest.mark.parametrize(
    "text, shown",
    [
        ("HF_TOKEN=hf_abcdefghijklmnop", "HF_TOKEN=***"),
        ("HUGGING_FACE_HUB_TOKEN=other", "HUGGING_FACE_HUB_TOKEN=***"),
        ("HF_ENDPOINT=https://me:pass@mirror/hub", "HF_ENDPOINT=https://***@mirror/hub"),
        ("python x.py --api-key=12 --password 34 hf_abcdefghijkl", "python x.py --api-key=*** --password *** ***"),
        ("HF_HUB_OFFLINE=1", "HF_HUB_OFFLINE=1"),
        ("the tokenizer has no added token <|im_start|>", "the tokenizer has no added token <|im_start|>"),
        ("XLA_FLAGS=--xla_dump_to=/x LIBTPU=1", "XLA_FLAGS=--xla_dump_to=/x LIBTPU=1"),
    ],
)
def test_secrets_are_masked_and_nothing_else_is(text, shown):
    assert doctor.masked(text) == shown


@pytest.fixture
def no_accelerator(monkeypatch, tmp_path):
    """This machine without its accelerators and its environment's own secrets."""
    monkeypatch.setattr(doctor, "tpu_files", lambda *folders: [])
    monkeypatch.setattr(doctor, "gpu_files", lambda *folders: [])
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:pass@localhost:1")
    monkeypatch.chdir(tmp_path)


def test_the_verb_looks_at_everything_and_prints_what_an_issue_needs(no_accelerator, model, data, capsys):
    data.write_text('{"request": "Hi", "images": ["a.png"]}')
    code = main(["doctor", "--model", str(model), "--data", str(data), "--output", "runs", "--json"])
    printed = capsys.readouterr().out
    checks = {check["name"]: check for check in json.loads(printed)["checks"]}
    assert {checks[name]["status"] for name in ("packages", "jax", "devices", "data", "model")} == {"ok"}
    assert {"host memory", "open files", "output", "compile cache", "hub cache", "gs://", "hub", "clock"} <= set(checks)
    assert code == int(any(check["status"] == "problem" for check in checks.values()))
    assert all(check["fix"] for check in checks.values() if check["status"] == "problem")
    report = json.loads(printed)["report"]
    assert f"jax {VERSIONS['jax']}" in report and "JAX_PLATFORMS=cpu" in report and "cpu: 1 × cpu here" in report
    assert "HF_TOKEN=***" in report and "abcdefghijklmnop" not in printed


def test_a_problem_is_printed_with_its_fix_and_exits_with_1(no_accelerator, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "ask", lambda call, env, seconds: HUNG if (call, seconds) == ("print_devices()", 60) else {}
    )
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert (
        "problem  devices: JAX does not answer for 60 s; /dev shows no accelerator\n         → JAX_PLATFORMS=cpu"
        in printed
    )
    report = printed.split("```text\n")[1]
    assert "devices: JAX does not answer for 60 s" in report and report.endswith("```\n")
    assert "HF_ENDPOINT=http://***@localhost:1" in report


def test_the_hubs_address_is_printed_without_its_password(no_accelerator, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(doctor, "ask", lambda call, env, seconds: {"error": "does not answer"})
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "→ curl -I http://***@localhost:1" in printed and "pass" not in printed


def test_a_check_that_fails_itself_leaves_the_others(no_accelerator, monkeypatch, capsys):
    def check_packages(versions, requires):
        raise ImportError("packaging is broken")

    monkeypatch.setattr(doctor, "check_packages", check_packages)
    monkeypatch.setattr(doctor, "ask", lambda call, env, seconds: CPU)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "problem  check_packages: could not be done: ImportError: packaging is broken" in printed
    assert "ok       devices: cpu" in printed

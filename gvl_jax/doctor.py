"""`gvl doctor`: what stands in the way on this machine, and the command that removes it.

A check is a function of what it looks at; `run` gives it the real thing.
"""

import json
import os
import platform
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from email.utils import parsedate_to_datetime
from math import inf, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gvl_jax.machine import ask, gpu_files, host_memory, install_jax, installed, jax_extra, tpu_files

GB = 1e9
REPORTED = re.compile(r"(GVL|HF|HUGGING_FACE|JAX|LIBTPU|TPU|XLA)_|CUDA_VISIBLE_DEVICES$")  # environment variables
SECRET = r"[\w-]*(?:token(?!i)|secret|passw|api[-_]?key)[\w-]*"
SECRETS = re.compile(rf"(?i)(--{SECRET}[=\s]+|{SECRET}[=:]\s*)\S+|(?-i:\bhf_[A-Za-z0-9]{{8,}})|(?<=://)[^/@\s]+(?=@)")
# What JAX says when it does not start, and the environment variable that makes it say so.
BLAMED = {"XLA_FLAGS": "XLA_FLAGS", "LIBTPU_INIT_ARGS": "LIBTPU_INIT_ARGS", "initialize backend": "JAX_PLATFORMS",
          "AssertionError": "JAX_PLATFORMS", "be defined": "GVL_DISTRIBUTED"}  # fmt: skip
Status = Literal["ok", "warning", "problem"]


class Check(NamedTuple):
    """One line of the output."""

    name: str
    status: Status
    found: str
    fix: str = ""  # a command; every problem has one


def enough(name: str, got: float, wanted: float, found: str, fix: str) -> Check:
    return Check(name, "ok", found) if got >= wanted else Check(name, "warning", found, fix)


def masked(text: str) -> str:
    """Without the tokens and passwords of environment variables, command lines and addresses."""
    return SECRETS.sub(lambda found: f"{found[1] or ''}***", text)


def unmet(versions: Mapping[str, str], requires: Iterable[str], extra: str = "") -> dict[str, str]:
    """What of `requires` is not among `versions`: {name and range: what is wrong}."""
    bad = {}
    for need in map(Requirement, requires):
        got = versions.get(canonicalize_name(need.name))
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        if got is None or not need.specifier.contains(got, prereleases=True):
            wanted = need.specifier or "any version"
            bad[f"{need.name}{need.specifier}"] = f"{need.name}: {got or 'not installed'}, expected {wanted}"
    return bad


def check_packages(versions: Mapping[str, str], requires: Iterable[str]) -> list[Check]:
    """requires: of gvl-jax; Python counts as a package."""
    venv = "python3.12 -m venv .venv && .venv/bin/pip install -e ."
    bad = unmet(versions, requires)
    fixes = {need: venv if need.startswith("python") else f'python -m pip install "{need}"' for need in bad}
    shown = [f"{name} {versions.get(name)}" for name in ("python", "flax", "orbax-checkpoint", "transformers")]
    fine = Check("packages", "ok", f"{', '.join(shown)} and the others; torch is not needed")
    return [Check("packages", "problem", found, fixes[need]) for need, found in bad.items()] or [fine]


def check_jax(versions: Mapping[str, str], requires: Iterable[str], extra: str) -> Check:
    """jax, jaxlib and what drives the accelerator; jax's own requirements tie their versions together."""
    found, fix = list(unmet(versions, requires, extra).values()), install_jax(versions, extra)
    others = [name for name in versions if extra.startswith("cuda") and re.match(f"jax-cuda(?!{extra[4:]}-)", name)]
    if others:  # each registers itself as "cuda", and one of them wins
        found.append(f"{', '.join(others)}: expected {extra} alone")
        fix = f"python -m pip uninstall -y {' '.join(others)} && {fix}"
    if found:
        return Check("jax", "problem", "; ".join(found), fix)
    parts = [name for name in ("jax", "jaxlib", "libtpu", f"jax-{extra}-plugin") if name in versions]
    return Check("jax", "ok", ", ".join(f"{name} {versions[name]}" for name in parts))


def check_tpu_lock(tpu: list[str], proc: Path, lockfile: Path) -> Check:
    """Another process that has a TPU, or libtpu's lock, open: libtpu lets one process in."""
    held, hidden = {}, 0
    for folder in proc.glob("[0-9]*"):
        try:
            opened = {os.readlink(link) for link in (folder / "fd").iterdir()}
            if opened & {*tpu, str(lockfile)} and int(folder.name) != os.getpid():
                command = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
                held[folder.name] = f"{(folder / 'comm').read_text().strip()}: {masked(command[:2000])[:120]}"
        except PermissionError:
            hidden += 1
        except OSError:  # it ended meanwhile
            continue
    if held:
        found = "held by " + ", ".join(f"process {pid} ({what})" for pid, what in held.items())
        return Check("tpu lock", "problem", found, f"kill {' '.join(held)}")
    found = "no process holds it" + (f"; {hidden} of other users cannot be seen: sudo gvl doctor" if hidden else "")
    if lockfile.exists():
        status: Status = "warning" if os.access(lockfile, os.W_OK) else "problem"
        return Check("tpu lock", status, f"{lockfile} is there, {found}", f"sudo rm {lockfile}")
    return Check("tpu lock", "ok", found)


def check_devices(said: Mapping[str, Any], files: list[str], env: Mapping[str, str], install: str) -> Check:
    """said: what `print_devices` was asked. files: of accelerators. install: the command for the right jax."""
    seen, error = ", ".join(files) or "no accelerator", said.get("error", "")
    if "does not answer" in error:
        fix = "JAX_PLATFORMS=cpu gvl doctor  # if this answers, the accelerator does not: sudo reboot"
        if waits := [name for name in ("GVL_DISTRIBUTED", "JAX_COORDINATOR_ADDRESS") if name in env]:
            fix = f"unset {waits[0]}  # or start the same command on all hosts at once"
        elif any(re.search("accel|vfio", file) for file in files):
            fix = 'gcloud compute tpus tpu-vm ssh NAME --worker=all --command="gvl doctor"  # a pod: all hosts at once'
        return Check("devices", "problem", f"JAX {error}; /dev shows {seen}", fix)
    if not error and (said["backend"] != "cpu" or not files):
        memory = f" of {said['bytes'] / GB:.1f} GB" if said["bytes"] else ""
        found = f"{said['backend']}: {said['here']} × {said['kind']}{memory} here, {said['devices']} in all"
        return Check("devices", "ok", f"{found}, process {said['process']} of {said['processes']}")
    if error:
        found, fix = f"does not start: {error}", 'python -c "import jax; jax.devices()"  # the whole message'
        blamed = [name for part, name in BLAMED.items() if part in error and name in env]
        if holder := re.search(r"in use by process with pid (\d+)", error):
            fix = f"kill {holder[1]}"
    else:
        found, fix = f"computes on the CPU, /dev shows {seen}: {said['stderr']}", install
        blamed = ["JAX_PLATFORMS"] if env.get("JAX_PLATFORMS", "").startswith("cpu") else []
        blamed += ["CUDA_VISIBLE_DEVICES"] if env.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and "nvidia" in seen else []
    return Check("devices", "problem", f"JAX {found}", f"unset {blamed[0]}" if blamed else fix)


def check_memory(free: float, limit: float) -> Check:
    found = f"{free / GB:.1f} GB free" + (f", the cgroup leaves {limit / GB:.1f} GB" if limit < free else "")
    return enough("host memory", min(free, limit), 8 * GB, found, "ps aux --sort=-rss | head  # who has it")


def check_folder(name: str, place: str, wanted: float, fix: str) -> Check:
    """Leave to write at `place`, which need not exist yet, and room for `wanted` bytes."""
    if not place:
        return Check(name, "warning", "none", fix)
    if place.startswith("gs://"):
        return Check(name, "ok", place)
    path = Path(place).absolute()
    folder = next(part for part in [path, *path.parents] if os.path.exists(part))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return Check(name, "problem", f"{folder} cannot be written to: {error.strerror}", fix)
    free = shutil.disk_usage(folder).free
    found = f"{free / GB:.1f} GB free at {place}"
    return Check(name, "problem", found, fix) if free < GB else enough(name, free, wanted, found, fix)


def check_buckets(versions: Mapping[str, str], places: Iterable[str]) -> Check:
    used, fix = [place for place in places if place.startswith("gs://")], "python -m pip install gcsfs"
    if used and "gcsfs" not in versions:
        return Check("gs://", "problem", f"{used[0]} needs gcsfs", fix)
    return Check("gs://", "ok", f"gcsfs {versions.get('gcsfs', f'is not installed; for a bucket: {fix}')}")


def check_clock(now: float, installed_at: float, hub_date: str | None) -> Check:
    """A clock that is minutes off has its requests refused by the hub and by buckets."""
    shown, fix = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)), "sudo timedatectl set-ntp true"
    if now < installed_at - 86400:  # a day: files travel between time zones
        return Check("clock", "problem", f"{shown} is before gvl_jax was installed", fix)
    if hub_date and abs(now - parsedate_to_datetime(hub_date).timestamp()) > 300:
        return Check("clock", "problem", f"{shown}, the hub says {hub_date}", fix)
    return Check("clock", "ok", shown)


def check_hub(url: str, said: Mapping[str, Any] | None) -> Check:
    """said: what `print_date` was asked; None: HF_HUB_OFFLINE is set. A warning at most: a directory needs no hub."""
    if said is None:
        return Check("hub", "warning", "HF_HUB_OFFLINE is set: nothing is fetched", "unset HF_HUB_OFFLINE")
    if "error" in said:
        return Check("hub", "warning", f"{url} cannot be reached: {said['error']}", f"curl -I {url}")
    return Check("hub", "ok", f"{url} answers")


def check_data(path: Path) -> Check:
    """Every record of a JSONL file loads, a prepared data set opens, and the pictures of the first 100 records."""
    from gvl_jax.data.images import ImageRejected, open_image
    from gvl_jax.data.prepared import load_samples

    look = f"gvl data verify {path}" if path.is_dir() else f"ls -l {path}"
    try:
        samples = load_samples([path])
        pictures = [image for i in range(min(100, len(samples))) for image in samples[i].images]
        for image in pictures:
            open_image(image)
    except ImageRejected as error:
        if not isinstance(image, Path):  # of a prepared data set
            return Check("data", "problem", str(error), look)
        return Check("data", "problem", f"{image}: {error}", f"ls -l {image}  # paths start at {path.parent}")
    except (OSError, ValueError, RuntimeError) as error:
        line = re.search(r", line (\d+):", str(error))
        fix = f"sed -n {line[1]}p {path}" if line else look
        return Check("data", "problem", "; ".join(str(error).splitlines()[:2]), fix)
    return Check("data", "ok", f"{len(samples)} records; the {len(pictures)} pictures of the first 100 open")


def check_model(model: str, device_bytes: float) -> Check:
    """Config, tokenizer and every weight are there, by the headers. device_bytes: of all devices; 0: unknown."""
    from huggingface_hub import hf_hub_download
    from safetensors import safe_open

    from gvl_jax.data.tokenizer import load_tokenizer
    from gvl_jax.models.qwen_vl import hub, keys

    remote = not Path(model).expanduser().exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", model)
    fix = f"hf auth login && hf download {model}" if remote else f"hf download OWNER/NAME --local-dir {model}"
    found, shard = set[str](), Path()
    try:
        directory = Path(hf_hub_download(model, "config.json")).parent if remote else hub.resolve(model)
        if remote and not list(directory.glob("*.safetensors")):
            return Check("model", "warning", f"{model} is not downloaded yet", f"hf download {model}")
        table = keys.table(hub.load_config(directory))
        load_tokenizer(directory)
        hub.detect_layout(directory)
        for shard in directory.glob("*.safetensors"):
            with safe_open(shard, framework="np") as file:
                found |= {keys.to_hub_key(key) for key in file.keys()}
    except Exception as error:  # the hub's client alone raises a dozen types
        return Check("model", "problem", f"{shard.name or model}: {error}".splitlines()[0], fix)
    if missing := [key for weight in table for key in weight.keys if key not in found]:
        return Check("model", "problem", f"{directory} lacks {len(missing)} tensors, the first: {missing[0]}", fix)
    count = sum(len(weight.paths) * prod(weight.shape) for weight in table)
    # A trained parameter takes 12 bytes, the fp32 weight and AdamW's two moments, and its gradient 4 more.
    text = f"{count / 1e6:,.1f} M parameters; to train: {12 * count / GB:.3g} GB in fp32 with AdamW, and gradients"
    return enough("model", device_bytes or inf, 16 * count, text, "--trained language, or more devices")


def report(versions: Mapping[str, str], checks: list[Check], env: Mapping[str, str]) -> str:
    """What an issue needs: versions, platform, devices, what is wrong, the environment without its secrets."""
    names = ("gvl-jax", "python", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax",
             "orbax-checkpoint", "grain", "transformers", "tokenizers", "numpy", "pillow", "torch")  # fmt: skip
    lines = [platform.platform(), ", ".join(f"{name} {versions[name]}" for name in names if name in versions)]
    lines += [f"{line.name}: {line.found}" for line in checks if line.status != "ok" or line.name == "devices"]
    return "\n".join(lines + [masked(f"{name}={env[name]}") for name in sorted(env) if REPORTED.match(name)])


def run(model: str | None, data: Path | None, output: str, compile_cache: str, as_json: bool = False) -> int:
    """Print a line per check, and a block for an issue. → 1 if something is a problem, else 0."""
    checks: list[Check] = []

    def add(check: Callable[..., Check | list[Check]], *args: Any) -> None:
        try:
            found = check(*args)
        except Exception as error:  # a library is broken: the other checks still say something
            fix = "paste the block below into an issue"
            found = Check(check.__name__, "problem", f"could not be done: {type(error).__name__}: {error}", fix)
        for line in [found] if isinstance(found, Check) else found:
            line = line._replace(found=masked(line.found), fix=masked(line.fix))
            checks.append(line)
            if not as_json:
                print(f"{line.status:8} {line.name}: {line.found}" + (f"\n{'':9}→ {line.fix}" if line.fix else ""))

    env, (versions, requires) = dict(os.environ), installed()  # env: before importing jax adds to it
    tpu, gpu = tpu_files(Path("/dev"), Path("/sys")), gpu_files(Path("/dev"))
    driver, lock, shm = Path("/proc/driver/nvidia/version"), Path("/tmp/libtpu_lockfile"), Path("/dev/shm")
    extra = jax_extra(versions, bool(tpu), bool(gpu), driver.read_text() if driver.exists() else "")
    add(check_packages, versions, requires["gvl-jax"])
    if requires["jax"]:
        add(check_jax, versions, requires["jax"], extra)
    if tpu or lock.exists():
        add(check_tpu_lock, tpu, Path("/proc"), lock)
    said = ask("print_devices()", env, 60)
    add(check_devices, said, [*tpu, *gpu], env, install_jax(versions, extra))

    if Path("/proc/meminfo").exists():
        add(check_memory, *host_memory(Path("/proc"), Path("/sys/fs/cgroup")))
    if shm.exists():
        size = shutil.disk_usage(shm).total
        add(enough, "/dev/shm", size, GB, f"{size / GB:.1f} GB", "docker run --shm-size=8g …")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    add(enough, "open files", files, 4096, f"{files} a process", "ulimit -n 65536")
    add(check_folder, "output", output, 50 * GB, "gvl doctor --output DIR  # on another disk")
    add(check_folder, "compile cache", compile_cache, 2 * GB, "export JAX_COMPILATION_CACHE_DIR=DIR")
    hub_cache = env.get("HF_HUB_CACHE", env.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")))
    add(check_folder, "hub cache", hub_cache, 20 * GB, "export HF_HOME=DIR")
    add(check_buckets, versions, [output, compile_cache])

    url, offline = env.get("HF_ENDPOINT", "https://huggingface.co"), env.get("HF_HUB_OFFLINE", "0").upper()
    answer = None if offline in ("1", "ON", "YES", "TRUE") else ask(f"print_date({url!r})", env, 3)
    add(check_hub, url, answer)
    add(check_clock, time.time(), Path(__file__).stat().st_mtime, (answer or {}).get("date"))
    if data:
        add(check_data, data)
    if model:
        add(check_model, model, (said.get("bytes") or 0) * said.get("devices", 0))

    text = report(versions, checks, env)
    if as_json:
        print(json.dumps({"checks": [line._asdict() for line in checks], "report": text}))
    else:
        print(f"\nFor an issue:\n\n```text\n{text}\n```")
    return int(any(line.status == "problem" for line in checks))

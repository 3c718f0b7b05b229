"""What this machine has: packages, device files, memory. And what may never come back, asked in a process of its own
with a time limit: JAX, while another process or a missing host keeps the TPU waiting, and the network."""

import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from packaging.utils import canonicalize_name


def installed() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Versions by canonical name, Python's too; and what gvl-jax (by its pyproject.toml) and jax require."""
    versions: dict[str, str] = {"python": platform.python_version()}
    requires: dict[str, list[str]] = {"gvl-jax": [], "jax": []}
    for package in importlib.metadata.distributions():  # of two the first is imported
        name = canonicalize_name(package.name or "")  # none: left behind by a broken pip
        if name and name not in versions:
            versions[name] = package.version
            if name in requires:
                requires[name] = [f"python{package.metadata['Requires-Python']}", *(package.requires or [])]
    return versions, requires


def tpu_files(dev: Path, sys_folder: Path) -> list[str]:
    """/dev/accelN, and /dev/vfio/N if a device of IOMMU group N is Google's."""
    found = list(dev.glob("accel[0-9]*"))
    for path in dev.glob("vfio/[0-9]*"):
        vendors = sys_folder.glob(f"kernel/iommu_groups/{path.name}/devices/*/vendor")
        found += [path] if any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors) else []
    return sorted(map(str, found))


def gpu_files(dev: Path) -> list[str]:
    """/dev/nvidiaN; /dev/dxg is a GPU under Windows."""
    return sorted(map(str, [*dev.glob("nvidia[0-9]*"), *dev.glob("dxg")]))


def jax_extra(versions: Mapping[str, str], tpu: bool, gpu: bool, driver: str) -> str:
    """Which extra of jax fits: tpu, cuda12, cuda13 or none (""). driver: the text of /proc/driver/nvidia/version."""
    release = re.search(r"\b(\d{3})\.\d+", driver)
    old = release is not None and int(release[1]) < 580  # CUDA 13 needs driver 580, CUDA 12 needs 525
    only12 = "jax-cuda12-plugin" in versions and "jax-cuda13-plugin" not in versions
    return "tpu" if tpu else "" if not gpu else "cuda12" if old or only12 else "cuda13"


def install_jax(versions: Mapping[str, str], extra: str) -> str:
    """The command for what belongs to the jax that is there."""
    command = f'python -m pip install -U "jax{extra and f"[{extra}]"}=={versions.get("jax", "0.10.*")}"'
    return command + "  # not libtpu alone: pip takes one that does not fit" * (extra == "tpu")


def host_memory(proc: Path, cgroup: Path) -> tuple[int, float]:
    """Bytes that are free on a Linux host, and those that the cgroups of this process leave beside what is taken: page
    cache can be had, so it is not."""
    free = re.findall(r"MemAvailable: +(\d+) kB", (proc / "meminfo").read_text())
    limits = [inf]
    for group in re.findall(r"^\d+:(?:memory)?:/(.*)", (proc / "self/cgroup").read_text(), re.MULTILINE):
        for folder in [Path(group), *Path(group).parents]:  # version 2, version 1
            for file in (cgroup / folder / "memory.max", cgroup / "memory" / folder / "memory.limit_in_bytes"):
                if file.exists():
                    stat = file.with_name("memory.stat")
                    taken = re.findall(r"^(?:anon|total_rss) (\d+)", stat.read_text(), re.M) if stat.exists() else []
                    limits.append(float(file.read_text().replace("max", "inf")) - sum(map(int, taken)))
    return int(free[0]) * 1024, min(limits)


def ask(call: str, env: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """The JSON that `call`, Python code on the functions below, prints last, and the last line of its errors as
    "stderr"; or what went wrong as "error". A process that does not answer is killed."""
    command = [sys.executable, "-P", "-c", f"from gvl_jax.machine import *; {call}"]  # -P: not the working directory's
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"does not answer for {seconds:g} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # not even that ends what is stuck in a driver
                process.communicate(timeout=5)
    last = (err.strip().splitlines() or [""])[-1]
    if process.returncode:
        return {"error": last or f"exit code {process.returncode}"}
    return json.loads(out.splitlines()[-1]) | {"stderr": last}


def print_devices() -> None:
    """The devices that JAX takes, once a small product was right on one."""
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}  # leave room; one line
    import jax

    from gvl_jax.sharding import start

    start()
    here, ones = jax.local_devices(), jax.numpy.ones((8, 8))
    if float((ones @ ones).sum()) != 512:
        raise ArithmeticError("a product of ones is wrong")
    said = {"backend": jax.default_backend(), "kind": here[0].device_kind, "here": len(here)}
    said |= {"devices": jax.device_count(), "process": jax.process_index(), "processes": jax.process_count()}
    print(json.dumps(said | {"bytes": (here[0].memory_stats() or {}).get("bytes_limit")}))


def print_date(url: str) -> None:
    """When it is, by the server at `url`."""
    print(json.dumps({"date": urlopen(Request(url, method="HEAD")).headers["Date"]}))

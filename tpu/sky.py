"""Run `gvl` on a TPU slice as a managed job of SkyPilot, which starts it again elsewhere after a preemption.

    python tpu/sky.py --type v5p-8 --bucket BUCKET --dry-run -- sft configs/3b/sft.yaml …

--dry-run prints the task as YAML; without it, `sky jobs launch` gets it after a question.
"""

import shlex
import subprocess
import sys
from typing import Any

import yaml
from launch import AGAIN, MOUNT, ROOT, confirm, describe, environment, parse, parser
from slices import SLICES


def task(o) -> dict[str, Any]:
    """A SkyPilot task; `setup` and `run` are executed on every host of the slice."""
    size = SLICES[o.type]
    place = "/".join(["gcp", *([o.zone.rsplit("-", 1)[0], o.zone] if o.zone else [])])
    files = {"file_mounts": {MOUNT: {"source": f"gs://{o.bucket}", "mode": "MOUNT"}}} if o.bucket else {}
    return {
        "name": o.name,
        "resources": {
            "infra": place,
            "accelerators": f"tpu-{size.accelerator}",
            "accelerator_args": {"runtime_version": size.generation.runtime},
            "use_spot": o.capacity == "spot",
            # Preempted, or 75: again without end. Any other failure: so many times.
            "job_recovery": {"max_restarts_on_errors": o.max_restarts, "recover_on_exit_codes": [AGAIN]},
        },
        "workdir": ".",
        **files,
        "envs": environment(),
        # The images have Python 3.10; uv brings 3.11.
        "setup": "python3 -m pip install --quiet --user uv"
        " && { test -d ~/gvl_env || python3 -m uv venv --quiet --python 3.11 ~/gvl_env; }"
        " && python3 -m uv pip install --quiet --python ~/gvl_env/bin/python gcsfs -e '.[tpu]'",
        "run": f"~/gvl_env/bin/gvl {shlex.join(o.gvl)}",
    }


def main(argv: list[str]) -> int:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--type", choices=SLICES, required=True, help="slice")
    options.add_argument("--zone", help="default: any that has room; better the one of the bucket")
    o = parse(options, argv)
    if not o.gvl:
        options.error("no gvl command after --")
    if o.capacity == "flex-start":
        options.error("--capacity flex-start is for queued.py")
    text = yaml.safe_dump(task(o), sort_keys=False, width=10_000)
    path = ROOT / ".cache" / f"{o.name}.sky.yaml"
    if o.dry_run:
        print(text, end="")
        return 0
    confirm(f"This creates {describe(o)}, and a small controller VM that stays until `sky down` ends it. Billing "
            f"starts when they run. To stop:\n  sky jobs cancel --name {o.name}", o.yes)  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return subprocess.run(["sky", "jobs", "launch", f"--name={o.name}", "--yes", str(path)], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

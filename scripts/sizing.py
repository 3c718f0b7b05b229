"""tpu/sizing.md: what fits on which TPU slice, by `gvl plan`. A row that is in the folder of results is not compiled
again: remove its file there.

    python scripts/sizing.py > tpu/sizing.md
    python scripts/sizing.py --rows 3b/sft/v5e-16 7b/rl/v6e-8 > tpu/sizing.md
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tpu"))
from slices import SLICES  # noqa: E402

NAMES = ("v5e-16", "v6e-8", "v6e-64", "v5p-16", "v5p-128", "v5p-512")
# What a chip has room for, where the config does not say it: rows of 2,048 tokens hold 8,192 patches each, a prompt of
# RL with 16 completions 12,288.
FLAGS = {
    "sft": {"v5e": "--rows 1 --buckets.patches 4096 8192", "v6e": "--rows 2 --buckets.patches 4096 16384", "v5p": ""},
    "rl": {"v5e": "", "v6e": "", "v5p": "--rows 4 --buckets.patches 4096 16384 49152"},
}
SMALLER = {  # where these do not fit
    "7b/sft/v5e-16": "--rows 1 --buckets.patches 4096",
    "7b/sft/v6e-8": "--rows 1 --buckets.patches 4096 8192",
}
ROWS = [f"{size}/{stage}/{name}" for size in ("3b", "7b") for stage in FLAGS for name in NAMES]

HEAD = """\
# What fits where

Made by `python scripts/sizing.py > tpu/sizing.md`; nothing in it was run on a TPU. Each row is a
`gvl plan` of `configs/3b` or `configs/7b` with the flags shown: all functions of the stage, for the largest micro-batch
that its buckets allow, through the compiler for that slice. Peak: of the program that needs most, with what is alive
beside it, on each chip, against what a program may use.

| stage | slice | flags | mesh | peak GiB | fits |
|---|---|---|---|---|---|
"""


def flags(row: str) -> str:
    """What `gvl sft` and `gvl rl` need on the slice beside the config file."""
    _, stage, name = row.split("/")
    return f"--mesh.fsdp {min(16, SLICES[name].chips)} {SMALLER.get(row, FLAGS[stage][name.split('-')[0]])}".strip()


def planned(row: str, results: Path) -> dict | None:
    """Compile what is not there. → the plan, None if it could not be made."""
    path = results / f"{row.replace('/', '_')}.json"
    if not path.exists():
        size, stage, name = row.split("/")
        topology = f"{name.split('-')[0]}:{SLICES[name].topology}"
        call = [sys.executable, "-m", "gvl_jax.cli", "plan", f"configs/{size}/{stage}.yaml", "--topology", topology]
        subprocess.run([*call, *flags(row).split(), "--json", str(path)], stdout=sys.stderr, check=False)
    return json.loads(path.read_text()) if path.exists() else None


def cells(row: str, plan: dict) -> list[str]:
    size, stage, name = row.split("/")
    most = max(plan["programs"], key=lambda one: (one["problem"] == "does not fit", one["peak"]))
    wrong = [one for one in plan["programs"] if one["problem"]]
    verdict = "; ".join(f"{one['name'].split()[0]}: {one['problem']}. {' or '.join(one['advice'])}" for one in wrong)
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
    peak = f"{most['peak'] / 2**30:.1f} of {most['limit'] / 2**30:.2f}, {most['name'].split()[0]}"
    return [f"{size} {stage}", name, f"`{flags(row)}`", mesh, peak, verdict or "yes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("tpu/sizing"), help="folder (default: %(default)s)")
    parser.add_argument("--rows", nargs="*", choices=ROWS, metavar="ROW", help="compile these; given empty: none")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    wanted = ROWS if options.rows is None else options.rows
    lines, missing = [], []
    for row in ROWS:
        path = options.results / f"{row.replace('/', '_')}.json"
        plan = planned(row, options.results) if row in wanted or path.exists() else None
        if plan is None:
            missing.append(row)
        else:
            lines.append("| " + " | ".join(cells(row, plan)) + " |")
    print(HEAD + "\n".join(lines))
    if missing:
        print(f"\nNot compiled yet: {', '.join(missing)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

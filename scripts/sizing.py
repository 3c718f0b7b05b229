"""tpu/sizing.md: what fits on which TPU slice, by `gvl plan`. A row that is in the folder of results is not compiled
again.

    python scripts/sizing.py --results runs/sizing > tpu/sizing.md
    python scripts/sizing.py --results runs/sizing --rows 3b/sft/v5e-16 7b/rollout/v6e-8 > tpu/sizing.md
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SLICES = {  # Cloud's name → topology, chips, rows of SFT and prompts of RL on each chip
    "v5e-16": ("v5e:4x4", 16, 1, 1),
    "v6e-8": ("v6e:2x4", 8, 2, 1),
    "v6e-64": ("v6e:8x8", 64, 2, 1),
    "v5p-16": ("v5p:2x2x2", 8, 8, 1),
    "v5p-128": ("v5p:4x4x4", 64, 8, 1),
    "v5p-512": ("v5p:4x8x8", 256, 8, 1),
}
STAGES = {"sft": ("accumulate", "update"), "rl update": ("accumulate", "update"), "rollout": ("prefill", "decode")}
ROWS = [f"{size}/{stage}/{name}" for size in ("3b", "7b") for stage in STAGES for name in SLICES]

HEAD = """\
# What fits where

Made by `python scripts/sizing.py --results runs/sizing > tpu/sizing.md`; nothing in it was run on a TPU. Each row is a
`gvl plan` of the config of 3B or 7B: the real functions of the stage, for the largest micro-batch that its buckets
allow, through the compiler for that slice. Peak: of the program that needs most, with what is alive beside it, on each
chip, against what a program may use. `buckets.patches` holds the pictures that rows of so many tokens can hold: four
patches make a token. Rollout: `prompts` decoded together, 16 completions of each at a time.

| model | stage | slice | mesh | rows or prompts a chip | peak GiB | fits | compiled in |
|---|---|---|---|---|---|---|---|
"""


def command(row: str) -> list[str]:
    """The flags of `gvl plan` for a row, without those of its output."""
    size, stage, name = row.split("/")
    topology, chips, rows, prompts = SLICES[name]
    kind = "sft" if stage == "sft" else "rl"
    flags = [f"configs/{size}/{kind}.yaml", "--topology", topology, "--mesh.fsdp", str(min(16, chips))]
    if kind == "sft":
        return [*flags, "--rows", str(rows), "--buckets.patches", str(8192 * rows)]
    if stage == "rollout":
        prompts = 16 if name.startswith("v5p") else 4
    flags += ["--prompts", str(prompts), "--buckets.patches", str(12288 * max(1, prompts // 8))]
    return [*flags, "--buckets.completion", "1024", "3072"]


def planned(row: str, results: Path) -> dict | None:
    """Compile what is not there. → the plan, None if it could not be made."""
    path = results / f"{row.replace('/', '_').replace(' ', '_')}.json"
    if not path.exists():
        only = STAGES[row.split("/")[1]]
        call = [sys.executable, "-m", "gvl_jax.cli", "plan", *command(row), "--json", str(path), "--only", *only]
        subprocess.run(call, stdout=sys.stderr, check=False)
    return json.loads(path.read_text()) if path.exists() else None


def cells(row: str, plan: dict) -> list[str]:
    size, stage, name = row.split("/")
    most = max(plan["programs"], key=lambda one: (one["problem"] == "does not fit", one["peak"]))
    wrong = [one for one in plan["programs"] if one["problem"]]
    verdict = "; ".join(f"{one['name'].split()[0]}: {one['problem']}. {' or '.join(one['advice'])}" for one in wrong)
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
    rows = command(row)[command(row).index("--rows" if stage == "sft" else "--prompts") + 1]
    peak = f"{most['peak'] / 2**30:.1f} of {most['limit'] / 2**30:.2f}"
    seconds = f"{sum(one['compile_seconds'] for one in plan['programs']):.0f} s"
    return [size.upper(), stage, name, mesh, rows, peak, verdict or "yes", seconds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/sizing"), help="folder (default: %(default)s)")
    parser.add_argument("--rows", nargs="*", choices=ROWS, metavar="ROW", help="compile these; given empty: none")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    wanted = ROWS if options.rows is None else options.rows
    lines, missing = [], []
    for row in ROWS:
        path = options.results / f"{row.replace('/', '_').replace(' ', '_')}.json"
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

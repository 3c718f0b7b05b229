"""What the launchers share: the `gvl` command and its environment, and the question before anything costs money."""

import argparse
import re
import sys
from pathlib import Path

from slices import SLICES

ROOT = Path(__file__).resolve().parent.parent
MOUNT = "/gcs"  # where every launcher shows the bucket as a folder, on all hosts
# Exit codes of `gvl`:
AGAIN = 75  # stopped and saved, start the same command again
LOST = 76  # another host has gone, maybe through an error that comes again: start again, but only so often
STAGES = ("sft", "mine", "rl", "eval", "moderate")

# Flags of libtpu that every launcher sets, each with its reason. None: the flags that are recommended most (async
# collective fusion, also of all-gathers and over several steps; async all-gather; overlap of collectives with the
# TensorCore) are on by default in libtpu 0.0.42: with each of them a step sharded by fsdp compiles to the same program.
LIBTPU_FLAGS: dict[str, str] = {}


def environment() -> dict[str, str]:
    """Variables of the `gvl` process on each host."""
    flags = " ".join(f"--{flag}" for flag in LIBTPU_FLAGS)
    return {"GVL_DISTRIBUTED": "1", **({"LIBTPU_INIT_ARGS": flags} if flags else {})}


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all launchers have. What follows `--` on the command line goes to `gvl` as it is."""
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [options] -- sft configs/3b/sft.yaml …")
    parser.add_argument("--name", type=_matching("[a-z]([-a-z0-9]{0,38}[a-z0-9])?"), default="gvl")
    parser.add_argument("--bucket", type=_matching("[a-z0-9][-_.a-z0-9]+"), help=f"bucket shown as {MOUNT}, no gs://")
    parser.add_argument("--capacity", choices=("spot", "on-demand", "flex-start"), default="spot")
    parser.add_argument("--max-restarts", type=int, default=5, help="after that many, give up (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask before something that costs money")
    return parser


def _matching(pattern: str):
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r}, expected text that matches {pattern}")
        return text

    return check


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The options, with `gvl` = the words after `--`.

    Raises:
        SystemExit: 2, a wrong option, or a stage that would write where everything is lost with the node, or that every
            host would do whole.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:cut])
    options.gvl = argv[cut + 1 :]
    if options.gvl and options.gvl[0] in STAGES:
        if options.gvl[0] == "moderate" and options.type and SLICES[options.type].hosts > 1:
            parser.error(f"every host would judge every row; give moderate a slice of one host, not {options.type}")
        if not _value(options.gvl, "--output").startswith(f"{MOUNT}/") or not options.bucket:
            parser.error(f"results on the node's own disk are lost with it; give --bucket NAME and --output {MOUNT}/…")
        if options.gvl[0] in ("sft", "rl") and not _value(options.gvl, "--checkpoints").startswith("gs://"):
            parser.error("checkpoints on the node's own disk are lost with it; add --checkpoints gs://BUCKET/NAME")
    return options


def _value(words: list[str], flag: str) -> str:
    """The last value of `flag` in words, written `--flag value` or `--flag=value`; empty if there is none."""
    values = [after for word, after in zip(words, [*words[1:], ""], strict=True) if word == flag]
    values += [word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}=")]
    return values[-1] if values else ""


def describe(options: argparse.Namespace) -> str:
    size = SLICES[options.type]
    return f"{size.accelerator}: {size.chips} chips on {size.hosts} host(s), {options.capacity}, named {options.name}"


def confirm(what: str, yes: bool) -> None:
    """Say what will cost money, and ask. Raises SystemExit (2) without an answer or a yes."""
    print(what, file=sys.stderr)
    if yes:
        return
    if sys.stdin.isatty():
        print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
        print("nothing was created", file=sys.stderr)
    else:
        print("nothing was created: there is no terminal to ask at; give --yes", file=sys.stderr)
    raise SystemExit(2)

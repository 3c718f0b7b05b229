"""Write the demo's corpus and its tiny checkpoint directory (no weights): make_tiny.py OUT [--seed N]."""

import argparse
from pathlib import Path

from gvl_jax.data import embedded, records, tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="gets corpus/ and model/")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    embedded.write(args.out / "corpus", args.seed)
    tiny.write_tiny(args.out / "model", tiny.training_texts(records.load_records(args.out / "corpus" / "train.jsonl")))


if __name__ == "__main__":
    main()

"""Render the pretraining corpus and the tasks: `python -m tools.embedded.build --help`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from keeplora.tasks.embedded import DATA
from tools.embedded.corpus import build_corpus
from tools.embedded.sources import DataRoot
from tools.embedded.tasks import write_tasks


def write_corpus(root: DataRoot, out: Path) -> None:
    """corpus.npz (masks, pictures) and captions.json (captions and source of each, masks first)."""
    corpus = build_corpus(root)
    captions, source = corpus.ordered()
    arrays = corpus.arrays()
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "corpus.npz", masks=arrays["masks"], pictures=arrays["pictures"])
    (out / "captions.json").write_text(json.dumps({"captions": captions, "source": source}), encoding="utf8")
    print(f"corpus: {len(source)} glyphs, {len({c for x in captions for c in x})} captions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory with the unpacked Debian packages")
    parser.add_argument("--out", type=Path, required=True, help="directory for the pretraining corpus")
    parser.add_argument("--data", type=Path, default=DATA, help="directory for the tasks (default: the package)")
    parser.add_argument("--only", choices=("corpus", "tasks"), help="build one of the two")
    args = parser.parse_args()
    root = DataRoot(args.root)
    if args.only != "tasks":
        write_corpus(root, args.out)
    if args.only != "corpus":
        write_tasks(root, args.out, args.data)


if __name__ == "__main__":
    main()

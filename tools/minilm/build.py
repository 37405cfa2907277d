"""Write keeplora/tasks/minilm/data/tasks.json from WordNet: `python -m tools.minilm.build --wordnet FOLDER`."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from tools.minilm.tasks import TASKS, WITNESS, Member
from tools.minilm.wordnet import Key, Synset, WordNet

DATA = Path(__file__).parents[2] / "keeplora" / "tasks" / "text" / "data"
SIZES = {"train": 56, "validation": 10, "test": 12}
"""Definitions of every class; classes with fewer keep the proportions."""
WORDS = range(3, 11)
"""Length of a definition: short ones make short sequences, and a step takes a third of a second on one core."""
UNFIT = ("offensive", "derogatory", "disparaging", "slur", "obscen", "vulgar", "taboo", "contemptuous", "sexual")


def members(net: WordNet, member: Member) -> set[Key]:
    """The synsets of a class."""
    kind, value = member[0], member[1]
    if kind == "file":
        return net.in_file(int(value))
    if kind == "topic":
        return net.of_topic(str(value))
    return net.under(str(value), int(member[2]))


def usable(synset: Synset) -> bool:
    """Short enough, and fit to be printed."""
    text = synset.gloss.lower()
    return len(synset.gloss.split()) in WORDS and not any(word in text for word in UNFIT)


def build_task(net: WordNet, name: str, classes: dict[str, Member], used: set[str]) -> dict[str, Any]:
    """Definitions by split and class. No definition is in two classes, two splits or two tasks."""
    rng = random.Random(name)
    pools = {c: members(net, member) for c, member in classes.items()}
    times = Counter(key for pool in pools.values() for key in pool)
    splits: dict[str, list[list[str]]] = {split: [] for split in SIZES}
    for pool in pools.values():
        texts = sorted({net.synsets[key].gloss for key in pool if times[key] == 1 and usable(net.synsets[key])} - used)
        rng.shuffle(texts)
        texts = texts[: sum(SIZES.values())]
        used.update(texts)
        share = min(1.0, len(texts) / sum(SIZES.values()))
        tests, validations = round(share * SIZES["test"]), round(share * SIZES["validation"])
        splits["test"].append(texts[:tests])
        splits["validation"].append(texts[tests : tests + validations])
        splits["train"].append(texts[tests + validations :])
    return {"name": name, "classes": list(classes), **splits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wordnet", type=Path, required=True, help="usr/share/wordnet of the unpacked package")
    parser.add_argument("--out", type=Path, default=DATA)
    parsed = parser.parse_args()
    net, used = WordNet(parsed.wordnet), set[str]()
    tasks = [build_task(net, name, classes, used) for name, classes in {**TASKS, **WITNESS}.items()]
    parsed.out.mkdir(parents=True, exist_ok=True)
    file = parsed.out / "tasks.json"
    file.write_text(json.dumps(tasks, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    for task in tasks:
        sizes = {split: sum(map(len, task[split])) for split in SIZES}
        print(f"{task['name']:<12} {len(task['classes'])} classes, {sizes}, smallest {min(map(len, task['train']))}")
    print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()

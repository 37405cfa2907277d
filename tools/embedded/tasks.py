"""Render the tasks' glyphs: none was seen in pretraining, and the splits of a task share no glyph, font or writer."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from keeplora.tasks.embedded.render import COLOURS
from tools.embedded.corpus import (
    CYRILLIC,
    GREEK,
    KINDS,
    LATIN,
    NUMBERS,
    SYMBOL_BLOCKS,
    arrow_direction,
    arrow_family,
    held_arrow,
    held_symbol,
    letter_name,
)
from tools.embedded.glyphs import EXTENT, LEVELS, SIDE, Pixels, mask
from tools.embedded.sources import DataRoot, Font, coverage

PARTS = ("train", "validation", "test")
COUNTS = {"train": 2560, "validation": 400, "test": 800}
DISTINCT = {"train": 1500, "validation": 300, "test": 600}
FONT_SPLIT = {
    "validation": ("eb garamond", "charis", "liberation mono"),
    "test": ("liberation sans", "liberation serif", "lobster", "comfortaa", "cmu serif", "fira code", "gentium",
             "yanone", "gfs didot"),
}  # fmt: skip
FRAMES = ("circled", "negative circled", "double circled", "squared", "negative squared", "parenthesized", "full stop")
FRAME_PATTERN = r"(?:dingbat )?((?:negative |double )?(?:circled|squared)|parenthesized) (?:latin|digit|number)"
DIRECTIONS = ("right", "up right", "up", "up left", "left", "down left", "down", "down right")


@dataclass
class Glyphs:
    """A task's glyphs: for every split, (label, glyph) pairs."""

    classes: tuple[str, ...]
    prompt: str
    look: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[tuple[int, Pixels]]] = field(default_factory=lambda: {p: [] for p in PARTS})
    counts: dict[str, int] = field(default_factory=lambda: dict(COUNTS))

    unsplit: dict[str, list[tuple[int, Pixels]]] = field(default_factory=dict)

    def add(self, part: str, label: int, glyph: Pixels | None) -> None:
        """Put a glyph into a split."""
        if glyph is not None:
            self.parts[part].append((label, glyph))

    def put(self, key: str, label: int, glyph: Pixels | None) -> None:
        """Give a glyph with the key (character, code point, kind of arrow) that `split` keeps in one split."""
        if glyph is not None:
            self.unsplit.setdefault(key, []).append((label, glyph))

    def split(self) -> None:
        """Divide the keys by hash: 55 % train, 15 % validation, 30 % test of every class (that of the first glyph).

        Not by `fraction`, which decides what is held out: CRC-32 is linear, so equal endings of two keys would tie
        their values together.
        """
        strata: dict[int, list[str]] = defaultdict(list)
        for key in sorted(self.unsplit, key=lambda k: hashlib.blake2b(k.encode(), digest_size=8).digest()):
            strata[self.unsplit[key][0][0]].append(key)
        for keys in strata.values():
            test, validation = max(1, round(0.3 * len(keys))), max(1, round(0.15 * len(keys)))
            for i, key in enumerate(keys):
                part = "test" if i < test else "validation" if i < test + validation else "train"
                self.parts[part] += self.unsplit[key]


def font_part(font: Font) -> str:
    return next((part for part, families in FONT_SPLIT.items() if font.family in families), "train")


def held_fonts(root: DataRoot) -> list[Font]:
    return [font for font in root.fonts() if font.held]


def digits(root: DataRoot) -> Glyphs:
    """Handwritten digits, split into consecutive blocks: the set was collected writer by writer."""
    task = Glyphs(NUMBERS, "digit {}", {"tilt": 15.0, "extent": (0.65, 0.95), "noise": (0.0, 30.0), "plain": 0.3})
    task.counts = {"train": 2560, "validation": 200, "test": 600}
    stored = load_digits()
    for i, (image, label) in enumerate(zip(stored.images, stored.target, strict=True)):
        small = Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((EXTENT, EXTENT), Image.Resampling.BICUBIC)
        canvas = np.zeros((SIDE, SIDE), np.uint8)
        canvas[1:-1, 1:-1] = np.round(np.asarray(small) / 255 * LEVELS) * (255 // LEVELS)
        task.add("train" if i < 997 else "validation" if i < 1197 else "test", int(label), canvas)
    return task


def alphabet(root: DataRoot, letters: list[str], prompt: str, look: dict[str, Any]) -> Glyphs:
    """Which letter is it, in fonts of families never seen; test families differ from training families."""
    names = {ch: letter_name(ch)[1] for ch in letters}
    if letters is CYRILLIC:
        names = {ch: " ".join(unicodedata.name(ch).lower().split()[3:]) for ch in letters}
    classes = tuple(dict.fromkeys(names.values()))
    task = Glyphs(classes, prompt, look)
    for font in held_fonts(root):
        for ch in letters:
            if ord(ch) in coverage(font.path):
                task.add(font_part(font), classes.index(names[ch]), mask(ch, font.path))
    return task


def letters(root: DataRoot) -> Glyphs:
    """Capital letters as a mirror shows them."""
    look = {"mirror": True, "tilt": 15.0, "extent": (0.5, 0.85), "noise": (0.0, 25.0), "plain": 0.3}
    return alphabet(root, LATIN[:26], "letter {}", look)


def greek(root: DataRoot) -> Glyphs:
    """Greek letters upside down."""
    look = {"lean": 180.0, "tilt": 15.0, "extent": (0.5, 0.85), "noise": (0.0, 20.0), "plain": 0.3}
    return alphabet(root, GREEK, "greek letter {}", look)


def cyrillic(root: DataRoot) -> Glyphs:
    """Cyrillic letters, leaning to the left."""
    look = {"lean": 25.0, "tilt": 20.0, "extent": (0.5, 0.85), "noise": (0.0, 20.0), "plain": 0.3}
    return alphabet(root, CYRILLIC, "cyrillic letter {}", look)


def arrows(root: DataRoot) -> Glyphs:
    """Where does it point: rightward arrows, turned in steps of 45 degrees when drawn, split by kind of arrow."""
    look = {"tilt": 10.0, "extent": (0.5, 0.9), "noise": (0.0, 40.0), "plain": 0.3, "ghost": 0.3}
    task = Glyphs(DIRECTIONS, "arrow pointing {}", look, {"turn": 45})
    unclear = (" above ", "through", "functional", "twisted", "soon", "circled", "corner")
    for _, point, name in symbols(root):
        if arrow_direction(name) == "right" and held_arrow(name) and not any(w in name for w in unclear):
            for path in [f for f in root.symbol_fonts() if point in coverage(f)]:
                for label in range(len(DIRECTIONS)):
                    task.put(arrow_family(name), label, mask(chr(point), path))
    return task


def symbols(root: DataRoot) -> Iterable[tuple[str, int, str]]:
    """(kind, code point, name) of the symbols of Unicode that pretraining uses or holds out."""
    for block, points in root.blocks():
        for point in points if block in SYMBOL_BLOCKS else ():
            if name := unicodedata.name(chr(point), "").lower():
                yield SYMBOL_BLOCKS[block], point, name


def colours(root: DataRoot) -> Glyphs:
    """Which colour is the small symbol on a ground of any other; painted when drawn, split by code point."""
    look = {"tilt": 15.0, "extent": (0.3, 0.5), "noise": (10.0, 45.0), "contrast": 35.0, "blur": 1.0}
    task = Glyphs(COLOURS, "{} symbol", look, {"paint": "front"})
    for _, point, _ in symbols(root):
        if held_symbol(point):
            path = next((f for f in root.symbol_fonts() if point in coverage(f)), None)
            glyph = mask(chr(point), path) if path else None
            if glyph is not None and glyph.mean() > 255 * 0.22:
                for label in range(len(COLOURS)):
                    task.put(f"{point:x}", label, glyph)
    return task


def frames(root: DataRoot) -> Glyphs:
    """What encloses the letter or digit: strongly tilted, with a ghost behind, split by code point."""
    look = {"tilt": 60.0, "extent": (0.5, 0.9), "noise": (0.0, 30.0), "plain": 0.2, "ghost": 0.3}
    task = Glyphs(FRAMES, "{} letter", look)
    blocks = ("Enclosed Alphanumerics", "Enclosed Alphanumeric Supplement", "Dingbats")
    for block, points in root.blocks():
        for p in points if block in blocks else ():
            words = unicodedata.name(chr(p), "").lower()
            frame = "full stop" if words.endswith("full stop") else re.match(FRAME_PATTERN, words)
            if frame and (held_symbol(p) or block not in SYMBOL_BLOCKS):
                name = frame if isinstance(frame, str) else frame[1]
                for path in [f for f in root.symbol_fonts() if p in coverage(f)]:
                    task.put(f"{p:x}", FRAMES.index(name.replace("dingbat ", "")), mask(chr(p), path))
    return task


def kinds(root: DataRoot) -> Glyphs:
    """What sort of symbol is it: the witness, never trained, hence nearly all of it is test."""
    look = {"tilt": 8.0, "extent": (0.6, 0.95), "noise": (0.0, 20.0), "plain": 0.4}
    task = Glyphs(KINDS, "{}", look)
    for kind, point, name in symbols(root):
        if kind in KINDS and held_symbol(point) and not arrow_direction(name):
            for path in [f for f in root.symbol_fonts() if point in coverage(f)][:2]:
                task.put(f"{point:x}", KINDS.index(kind), mask(chr(point), path))
    return task


# In the order of the sequence; the last is the witness.
TASKS: dict[str, Callable[[DataRoot], Glyphs]] = {
    "digits": digits, "greek": greek, "arrows": arrows, "letters": letters, "colours": colours, "cyrillic": cyrillic,
    "frames": frames, "kinds": kinds,
}  # fmt: skip


def choose(pairs: list[tuple[int, Pixels]], classes: int, count: int, distinct: int, seed: int) -> dict[str, Any]:
    """`count` examples, classes balanced, from at most `distinct` glyphs: glyphs, index and label arrays."""
    rng = np.random.default_rng(seed)
    by_class: dict[int, list[Pixels]] = defaultdict(list)
    for label, glyph in pairs:
        by_class[label].append(glyph)
    if len(by_class) != classes:
        raise RuntimeError(f"choose: {classes - len(by_class)} of {classes} classes have no glyph in a split.")
    place: dict[bytes, int] = {}
    stored: list[Pixels] = []
    index, labels = [], []
    for label in range(classes):
        pool = [by_class[label][i] for i in rng.permutation(len(by_class[label]))][: -(-distinct // classes)]
        wanted = count // classes + (label < count % classes)
        for i in range(wanted):
            glyph = pool[i % len(pool)]
            key = glyph.tobytes()
            if key not in place:
                place[key] = len(stored)
                stored.append(glyph)
            index.append(place[key])
            labels.append(label)
    order = rng.permutation(count)
    return {"glyphs": np.stack(stored), "index": np.array(index, np.uint16)[order],
            "label": np.array(labels, np.uint8)[order]}  # fmt: skip


def separate(task: Glyphs, pretrained: set[bytes]) -> None:
    """Drop what is pixel for pixel in the pretraining corpus or in a later split (a bar is an I in many fonts)."""
    seen = set(pretrained)
    for part in reversed(PARTS):
        task.parts[part] = [(y, g) for y, g in task.parts[part] if g.tobytes() not in seen]
        seen |= {g.tobytes() for _, g in task.parts[part]}


def write_tasks(root: DataRoot, corpus: Path, out: Path) -> None:
    """One npz per task and tasks.json, which says how the images are drawn."""
    out.mkdir(parents=True, exist_ok=True)
    pretrained = {glyph.tobytes() for glyph in np.load(corpus / "corpus.npz")["masks"]}
    described: dict[str, Any] = {"order": list(TASKS), "tasks": {}}
    for number, name in enumerate(TASKS):
        task = TASKS[name](root)
        task.split()
        separate(task, pretrained)
        arrays: dict[str, Any] = {}
        for i, part in enumerate(PARTS):
            seed = 1000 * number + i
            chosen = choose(task.parts[part], len(task.classes), task.counts[part], DISTINCT[part], seed)
            arrays |= {f"{part}_{key}": value for key, value in chosen.items()}
        np.savez_compressed(out / f"{name}.npz", **arrays)
        described["tasks"][name] = {"classes": task.classes, "prompt": task.prompt, "seed": number,
                                    "look": task.look, **task.more}  # fmt: skip
        sizes = [(len(arrays[f"{p}_glyphs"]), len(arrays[f"{p}_label"])) for p in PARTS]
        print(f"{name}: {len(task.classes)} classes, (glyphs, images) {sizes}, "
              f"{(out / f'{name}.npz').stat().st_size / 1e3:.0f} kB")  # fmt: skip
    (out / "tasks.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf8")

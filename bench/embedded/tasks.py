"""Render the tasks' glyphs. Nothing here was seen in pretraining; the splits of a task share no glyph, font or writer."""

from __future__ import annotations

import hashlib
import json
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

from .corpus import (
    CYRILLIC,
    GREEK,
    KINDS,
    LATIN,
    NUMBERS,
    SCRIPTS,
    SYMBOL_BLOCKS,
    arrow_direction,
    arrow_family,
    held_arrow,
    held_emoji,
    held_script,
    held_symbol,
    letter_name,
)
from .glyphs import EXTENT, LEVELS, SIDE, Pixels, mask, picture
from .sources import DataRoot, Font, coverage, fraction

PARTS = ("train", "validation", "test")
COUNTS = {"train": 2560, "validation": 400, "test": 800}
DISTINCT = {"train": 1500, "validation": 300, "test": 600}
FONT_SPLIT = {
    "validation": ("lato", "charis", "liberation mono"),
    "test": ("liberation sans", "liberation serif", "lobster", "comfortaa", "cmu serif", "fira code", "gentium",
             "yanone", "gfs didot"),
}  # fmt: skip
TASK_SCRIPTS = ("Arabic", "Armenian", "Cherokee", "Cuneiform", "Devanagari", "Ethiopic", "Georgian", "Hebrew",
                "Myanmar", "Runic", "Thai", "Yi")  # fmt: skip
DIRECTIONS = ("right", "up right", "up", "up left", "left", "down left", "down", "down right")
STYLES = ("bold serif", "italic serif", "regular serif", "bold sans serif", "italic sans serif",
          "regular sans serif", "monospace", "handwriting")  # fmt: skip
EMOJI_KINDS = {
    "face": ("face-", "cat-face", "monkey-face"), "animal": ("animal-",), "food": ("food-", "drink", "dishware"),
    "flag": ("country-flag", "flag"), "vehicle": ("transport-ground", "transport-water", "transport-air"),
    "person": ("person", "family"), "hand": ("hand-", "hands"), "clothing": ("clothing",), "plant": ("plant-",),
}  # fmt: skip


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
    """Handwritten digits; the images are in order of writer, so that blocks keep writers apart."""
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
    look = {"tilt": 35.0, "extent": (0.5, 0.85), "noise": (25.0, 60.0), "contrast": 60.0, "plain": 0.2}
    return alphabet(root, LATIN, "letter {}", look)


def greek(root: DataRoot) -> Glyphs:
    look = {"tilt": 25.0, "extent": (0.5, 0.85), "noise": (20.0, 50.0), "ghost": 0.3, "plain": 0.3}
    return alphabet(root, GREEK, "greek letter {}", look)


def cyrillic(root: DataRoot) -> Glyphs:
    look = {"tilt": 25.0, "extent": (0.5, 0.85), "noise": (10.0, 40.0), "plain": 0.3}
    return alphabet(root, CYRILLIC, "cyrillic letter {}", look)


def styles(root: DataRoot) -> Glyphs:
    """How is it set; unseen fonts, characters split."""
    look = {"tilt": 5.0, "extent": (0.6, 0.9), "noise": (0.0, 30.0), "plain": 0.6}
    task = Glyphs(STYLES, "{} letter", look)
    for font in held_fonts(root):
        style = font.kind if font.kind in ("monospace", "handwriting") else f"{font.style} {font.kind}"
        if style in STYLES:
            for ch in LATIN + GREEK + CYRILLIC:
                if ord(ch) in coverage(font.path):
                    task.put(ch, STYLES.index(style), mask(ch, font.path))
    return task


def arrows(root: DataRoot) -> Glyphs:
    """Where does it point; rightward arrows turned in steps of 45 degrees when drawn, split by kind of arrow."""
    look = {"tilt": 10.0, "extent": (0.5, 0.9), "noise": (0.0, 40.0), "plain": 0.3}
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
    """Which colour is the symbol, on a ground of any other colour; painted when drawn, split by code point."""
    look = {"tilt": 15.0, "extent": (0.6, 0.95), "noise": (10.0, 45.0), "contrast": 35.0}
    task = Glyphs(COLOURS, "{} symbol", look, {"paint": True})
    for _, point, _ in symbols(root):
        if held_symbol(point):
            path = next((f for f in root.symbol_fonts() if point in coverage(f)), None)
            glyph = mask(chr(point), path) if path else None
            if glyph is not None and glyph.mean() > 255 * 0.22:
                for label in range(len(COLOURS)):
                    task.put(f"{point:x}", label, glyph)
    return task


def scripts(root: DataRoot) -> Glyphs:
    """Which script is it; unseen letters, split by code point."""
    look = {"tilt": 15.0, "extent": (0.55, 0.9), "noise": (15.0, 45.0), "plain": 0.3}
    task = Glyphs(tuple(s.lower() for s in TASK_SCRIPTS), "{} script", look)
    points = root.letters_by_script()
    for label, script in enumerate(TASK_SCRIPTS):
        chosen = sorted((p for p in points[script] if held_script(p)), key=lambda p: fraction(f"pick {p:x}"))[:200]
        for path in root.script_fonts(SCRIPTS[script]):
            for p in chosen:
                if p in coverage(path):
                    task.put(f"{p:x}", label, mask(chr(p), path))
    return task


def emoji(root: DataRoot) -> Glyphs:
    """What sort of thing is it; unseen emoji, turned and noisy."""
    look = {"tilt": 30.0, "extent": (0.6, 0.95), "noise": (10.0, 40.0), "plain": 0.3}
    task = Glyphs(tuple(EMOJI_KINDS), "{}", look)
    for text, _, _, subgroup in root.emoji():
        for label, prefixes in enumerate(EMOJI_KINDS.values()):
            if held_emoji(text) and subgroup.startswith(prefixes) and ord(text[0]) in coverage(root.emoji_font):
                task.put(text, label, picture(text, root.emoji_font))
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


TASKS: dict[str, Callable[[DataRoot], Glyphs]] = {
    "digits": digits, "greek": greek, "arrows": arrows, "styles": styles, "colours": colours, "scripts": scripts,
    "letters": letters, "cyrillic": cyrillic, "emoji": emoji, "kinds": kinds,
}  # fmt: skip
ORDER = ("digits", "greek", "arrows", "styles", "colours", "scripts", "letters", "cyrillic", "emoji", "kinds")


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


def separate(task: Glyphs) -> None:
    """Drop from training what is pixel for pixel in validation or test, and from validation what is in test."""
    seen: set[bytes] = set()
    for part in reversed(PARTS):
        task.parts[part] = [(y, g) for y, g in task.parts[part] if g.tobytes() not in seen]
        seen |= {g.tobytes() for _, g in task.parts[part]}


def write_tasks(root: DataRoot, out: Path, order: tuple[str, ...] = ORDER) -> None:
    """One npz per task and tasks.json, which says how the images are drawn."""
    out.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {"order": list(order), "tasks": {}}
    for number, name in enumerate(order):
        task = TASKS[name](root)
        task.split()
        separate(task)
        arrays = {}
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

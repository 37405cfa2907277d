"""The pretraining corpus: glyphs with captions. What `tasks.py` uses is left out here, by the same `held_*` rules."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

import numpy as np

from tools.embedded.glyphs import Pixels, mask, picture
from tools.embedded.sources import DataRoot, Font, coverage, fraction

LATIN = [chr(c) for c in (*range(65, 91), *range(97, 123))]
DIGITS = list("0123456789")
GREEK = [chr(c) for c in (*range(0x391, 0x3AA), *range(0x3B1, 0x3CA)) if c not in (0x3A2, 0x3C2)]
CYRILLIC = [chr(c) for c in range(0x410, 0x450)]
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = {"letter": 0.36, "script": 0.18, "symbol": 0.24, "emoji": 0.22}

SCRIPTS = (
    "Arabic", "Armenian", "Bengali", "Cherokee", "Devanagari", "Ethiopic", "Georgian", "Gujarati", "Hebrew",
    "Kannada", "Khmer", "Lao", "Malayalam", "Myanmar", "Sinhala", "Tamil", "Telugu", "Thai", "Gurmukhi", "Tifinagh",
    "Runic", "Ogham", "Gothic", "Glagolitic", "Coptic", "Vai", "Yi", "Balinese", "Javanese", "Tibetan",
    "Canadian_Aboriginal", "Cuneiform", "Egyptian_Hieroglyphs", "Linear_B", "Deseret", "Old_Persian", "Nko",
    "Adlam",
)  # fmt: skip
SYMBOL_BLOCKS = {
    "Arrows": "arrow", "Supplemental Arrows-A": "arrow", "Supplemental Arrows-B": "arrow",
    "Supplemental Arrows-C": "arrow", "Mathematical Operators": "mathematical operator",
    "Supplemental Mathematical Operators": "mathematical operator",
    "Miscellaneous Mathematical Symbols-A": "mathematical symbol",
    "Miscellaneous Mathematical Symbols-B": "mathematical symbol", "Miscellaneous Technical": "technical symbol",
    "Box Drawing": "box drawing", "Block Elements": "block element", "Geometric Shapes": "geometric shape",
    "Geometric Shapes Extended": "geometric shape", "Miscellaneous Symbols": "symbol", "Dingbats": "dingbat",
    "Ornamental Dingbats": "dingbat", "Miscellaneous Symbols and Arrows": "symbol",
    "Braille Patterns": "braille pattern", "Musical Symbols": "musical symbol",
    "Byzantine Musical Symbols": "musical symbol", "Ancient Greek Musical Notation": "musical notation",
    "Alchemical Symbols": "alchemical symbol", "Mahjong Tiles": "mahjong tile", "Domino Tiles": "domino tile",
    "Playing Cards": "playing card", "Enclosed Alphanumerics": "enclosed alphanumeric",
    "Currency Symbols": "currency sign", "Letterlike Symbols": "letterlike symbol", "Number Forms": "number form",
    "Yijing Hexagram Symbols": "hexagram", "Tai Xuan Jing Symbols": "tetragram",
    "Counting Rod Numerals": "counting rod", "Phaistos Disc": "ancient sign", "Aegean Numbers": "ancient number",
    "Transport and Map Symbols": "transport symbol", "Miscellaneous Symbols and Pictographs": "pictograph",
    "Mathematical Alphanumeric Symbols": "mathematical letter",
}  # fmt: skip
KINDS = (
    "arrow", "mathematical operator", "box drawing", "geometric shape", "musical symbol", "alchemical symbol",
    "braille pattern", "technical symbol", "enclosed alphanumeric", "domino tile", "playing card", "hexagram",
)  # fmt: skip
EMOJI_GROUPS = {
    "Smileys & Emotion": "face or emotion", "People & Body": "person or body part",
    "Animals & Nature": "animal or plant", "Food & Drink": "food or drink", "Travel & Places": "travel or place",
    "Activities": "activity", "Objects": "object", "Symbols": "symbol", "Flags": "flag",
}  # fmt: skip

_DIRECTIONS = {
    "leftwards": "left", "rightwards": "right", "upwards": "up", "downwards": "down", "north east": "up right",
    "north west": "up left", "south east": "down right", "south west": "down left",
}  # fmt: skip


def clean(text: str) -> str:
    """Lower case words of letters and digits."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def arrow_direction(name: str) -> str | None:
    """Where a single-direction arrow points (`up left`), from its Unicode name; None for other names."""
    words = name.lower().replace("-", " ")
    if not re.search(r"arrow|harpoon|triangle headed", words) or " and " in words or "left right" in words:
        return None
    found = [d for d in _DIRECTIONS if d in words]
    return _DIRECTIONS[found[0]] if len(found) == 1 else None


def arrow_family(name: str) -> str:
    """An arrow's name without its direction: all turns of one arrow share it."""
    words = name.lower().replace("-", " ")
    for d in _DIRECTIONS:
        words = words.replace(d, "")
    return " ".join(words.split())


def held_script(point: int) -> bool:
    return fraction(f"script {point:x}") < 0.5


def held_arrow(name: str) -> bool:
    return fraction(f"arrow {arrow_family(name)}") < 0.55


def held_symbol(point: int) -> bool:
    return fraction(f"symbol {point:x}") < 0.4


def held_emoji(text: str) -> bool:
    return fraction(f"emoji {text}") < 0.4


@dataclass
class Corpus:
    """Glyphs and their captions, by source."""

    glyphs: list[Pixels] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    source: list[str] = field(default_factory=list)

    def add(self, glyph: Pixels | None, captions: list[str], source: str) -> None:
        if glyph is not None:
            self.glyphs.append(glyph)
            self.captions.append([c for c in map(clean, captions) if c])
            self.source.append(source)

    def arrays(self) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
        """Masks and pictures apart; the captions' order is masks first, then pictures."""
        flat = [g for g in self.glyphs if g.ndim == 2]
        colour = [g for g in self.glyphs if g.ndim == 3]
        return {"masks": np.stack(flat), "pictures": np.stack(colour)}

    def ordered(self) -> tuple[list[list[str]], list[str]]:
        order = [i for i, g in enumerate(self.glyphs) if g.ndim == 2]
        order += [i for i, g in enumerate(self.glyphs) if g.ndim == 3]
        return [self.captions[i] for i in order], [self.source[i] for i in order]


def letter_name(ch: str) -> tuple[str, str, str]:
    """(alphabet, name, case) of a letter: (`greek`, `alpha`, `small`)."""
    words = unicodedata.name(ch).lower().split()
    return words[0], words[-1], "capital" if "capital" in words else "small"


def letter_captions(ch: str, font: Font) -> list[str]:
    look = f"{font.style} {font.kind}"
    if ch in DIGITS:
        n = NUMBERS[int(ch)]
        return [f"digit {n}", f"digit {n}", f"number {n}", f"{look} digit {n}", "digit", look]
    alphabet, name, case = letter_name(ch)
    which = "" if alphabet == "latin" else alphabet + " "
    return [
        f"{which}letter {name}", f"{which}letter {name}", f"{case} {which}letter {name}",
        f"{which}{name}", f"{look} {which}letter {name}", look, f"{look} letter", f"{alphabet} letter",
    ]  # fmt: skip


def add_letters(corpus: Corpus, root: DataRoot) -> None:
    for font in root.fonts():
        if font.held:
            continue
        for ch in LATIN + DIGITS + GREEK + CYRILLIC:
            if ord(ch) in coverage(font.path):
                corpus.add(mask(ch, font.path), letter_captions(ch, font), "letter")


def add_scripts(corpus: Corpus, root: DataRoot) -> None:
    letters = root.letters_by_script()
    for script in SCRIPTS:
        shown = clean(script)
        points = [p for p in letters[script] if not held_script(p)]
        points = sorted(points, key=lambda p: fraction(f"pick {p:x}"))[:160]
        for path in root.script_fonts(script):
            for p in points:
                if p not in coverage(path):
                    continue
                name = clean(unicodedata.name(chr(p), ""))
                captions = [f"{shown} letter", f"{shown} script", shown, name, f"letter of {shown} script"]
                corpus.add(mask(chr(p), path), captions, "script")


def add_symbols(corpus: Corpus, root: DataRoot) -> None:
    fonts = root.symbol_fonts()
    for block, points in root.blocks():
        if block not in SYMBOL_BLOCKS:
            continue
        for p in points:
            name = unicodedata.name(chr(p), "").lower()
            pointing = arrow_direction(name)
            if not name or held_symbol(p) or (pointing and held_arrow(name)):
                continue
            kind = SYMBOL_BLOCKS[block]
            captions = [name, name, kind, f"{kind} {name}"]
            if pointing:
                captions += [f"{pointing} arrow", f"arrow pointing {pointing}"]
            for path in [f for f in fonts if p in coverage(f)][:3]:
                corpus.add(mask(chr(p), path), captions, "symbol")


def add_emoji(corpus: Corpus, root: DataRoot) -> None:
    keywords = root.emoji_keywords()
    points = coverage(root.emoji_font)
    for text, name, group, subgroup in root.emoji():
        if group not in EMOJI_GROUPS or held_emoji(text) or ord(text[0]) not in points:
            continue
        kind, part = EMOJI_GROUPS[group], clean(subgroup)
        captions = [name, name, f"{part} {name}", f"emoji of {kind}", kind, part, *keywords.get(text, [])]
        corpus.add(picture(text, root.emoji_font), captions, "emoji")


def build_corpus(root: DataRoot) -> Corpus:
    corpus = Corpus()
    for add in (add_letters, add_scripts, add_symbols, add_emoji):
        add(corpus, root)
    return corpus

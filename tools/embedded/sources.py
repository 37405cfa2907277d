"""Where the renderings come from: Debian packages unpacked under one data root, and what each font is used for.

`python -m tools.embedded.sources` prints the packages' names.

A font is either seen in pretraining or held out for the tasks, by whole family; `FAMILIES` says which.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fontTools.ttLib import TTFont

PACKAGES = (
    "fonts-anonymous-pro", "fonts-breip", "fonts-cabin", "fonts-cantarell", "fonts-cmu", "fonts-comfortaa",
    "fonts-courier-prime", "fonts-crosextra-caladea", "fonts-crosextra-carlito", "fonts-dancingscript",
    "fonts-dejavu-core", "fonts-dejavu-extra", "fonts-ebgaramond", "fonts-firacode", "fonts-gfs-didot",
    "fonts-gfs-neohellenic", "fonts-hack", "fonts-inconsolata", "fonts-jetbrains-mono", "fonts-junicode",
    "fonts-kristi", "fonts-lato", "fonts-liberation2", "fonts-linuxlibertine", "fonts-lobster", "fonts-lobstertwo",
    "fonts-noto-color-emoji", "fonts-noto-core", "fonts-noto-extra", "fonts-noto-mono", "fonts-open-sans",
    "fonts-play", "fonts-quicksand", "fonts-roboto-unhinted", "fonts-sil-andika", "fonts-sil-charis",
    "fonts-sil-gentium", "fonts-sora", "fonts-symbola", "fonts-tomsontalks", "fonts-vollkorn",
    "fonts-yanone-kaffeesatz", "unicode-data", "unicode-cldr-core",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One font family: file pattern under the font directory, kind of letter, and whether the tasks hold it out."""

    name: str
    pattern: str
    kind: str
    held: bool = False


@dataclass(frozen=True)
class Font:
    """One font file with the words that describe it."""

    path: Path
    family: str
    kind: str
    style: str
    held: bool


_USUAL = "(Regular|Bold|Italic|BoldItalic|Light|Black)"
FAMILIES = (
    Family("dejavu sans", r"dejavu/DejaVuSans(Condensed)?(-\w+)?\.ttf", "sans serif"),
    Family("dejavu serif", r"dejavu/DejaVuSerif(Condensed)?(-\w+)?\.ttf", "serif"),
    Family("dejavu mono", r"dejavu/DejaVuSansMono(-\w+)?\.ttf", "monospace"),
    Family("noto sans", rf"noto/NotoSans-(Condensed)?{_USUAL}?\.ttf", "sans serif"),
    Family("noto serif", rf"noto/NotoSerif-(Condensed)?{_USUAL}?\.ttf", "serif"),
    Family("noto mono", rf"noto/NotoSansMono-{_USUAL}\.ttf", "monospace"),
    Family("roboto", rf"roboto/unhinted/(RobotoTTF/Roboto|RobotoCondensed)-{_USUAL}\.ttf", "sans serif"),
    Family("open sans", rf"open-sans/OpenSans-{_USUAL}\.ttf", "sans serif"),
    Family("hack", rf"hack/Hack-{_USUAL}\.ttf", "monospace"),
    Family("jetbrains mono", rf"jetbrains-mono/JetBrainsMono-{_USUAL}\.ttf", "monospace"),
    Family("inconsolata", r"inconsolata/Inconsolata\.otf", "monospace"),
    Family("cantarell", rf"cantarell/Cantarell-{_USUAL}\.otf", "sans serif"),
    Family("quicksand", rf"quicksand/Quicksand-{_USUAL}\.ttf", "sans serif"),
    Family("caladea", r"crosextra/Caladea-\w+\.ttf", "serif"),
    Family("carlito", r"crosextra/Carlito-\w+\.ttf", "sans serif"),
    Family("vollkorn", rf"vollkorn/Vollkorn-{_USUAL}\.ttf", "serif"),
    Family("junicode", rf"junicode/JunicodeTwoBeta-{_USUAL}\.otf", "serif"),
    Family("play", rf"truetype/play/Play-{_USUAL}\.ttf", "sans serif"),
    Family("andika", r"andika/Andika-\w+\.ttf", "sans serif"),
    Family("lobster two", r"lobstertwo/LobsterTwo-\w+\.otf", "handwriting"),
    Family("liberation sans", r"liberation2/LiberationSans-\w+\.ttf", "sans serif", held=True),
    Family("liberation serif", r"liberation2/LiberationSerif-\w+\.ttf", "serif", held=True),
    Family("liberation mono", r"liberation2/LiberationMono-\w+\.ttf", "monospace", held=True),
    Family("lato", rf"lato/Lato-{_USUAL}\.ttf", "sans serif", held=True),
    Family("eb garamond", r"ebgaramond/EBGaramond12-\w+\.otf", "serif", held=True),
    Family("libertine", r"linux-libertine/LinLibertine_(R|RB|RI|RBI|DR)\.otf", "serif", held=True),
    Family("biolinum", r"linux-libertine/LinBiolinum_(R|RB|RI)\.otf", "sans serif", held=True),
    Family("cmu serif", r"cmu/cmun(rm|bx|ti|bi|sl)\.ttf", "serif", held=True),
    Family("cmu sans", r"cmu/cmun(ss|sx|si|so)\.ttf", "sans serif", held=True),
    Family("cmu mono", r"cmu/cmun(tt|tb|st)\.ttf", "monospace", held=True),
    Family("gfs didot", r"didot/GFSDidot\w*\.otf", "serif", held=True),
    Family("gfs neohellenic", r"neohellenic/GFSNeohellenic\w*\.otf", "sans serif", held=True),
    Family("gentium", r"gentium/Gentium-[IR]\.ttf", "serif", held=True),
    Family("charis", r"charis/CharisSIL-\w+\.ttf", "serif", held=True),
    Family("fira code", rf"firacode/FiraCode-{_USUAL}\.ttf", "monospace", held=True),
    Family("anonymous pro", r"anonymous-pro/Anonymous Pro( B| I| BI)?\.ttf", "monospace", held=True),
    Family("courier prime", r"courier-prime/Courier Prime( Bold| Italic)?\.otf", "monospace", held=True),
    Family("cabin", rf"cabin/Cabin-{_USUAL}\.otf", "sans serif", held=True),
    Family("sora", rf"sora/Sora-{_USUAL}\.otf", "sans serif", held=True),
    Family("comfortaa", rf"comfortaa/Comfortaa-{_USUAL}\.ttf", "sans serif", held=True),
    Family("yanone", rf"yanone-kaffeesatz/YanoneKaffeesatz-{_USUAL}\.otf", "sans serif", held=True),
    Family("lobster", r"lobster/lobster\.otf", "handwriting", held=True),
    Family("dancing script", r"dancingscript/DancingScript-\w+\.otf", "handwriting", held=True),
    Family("kristi", r"kristi/Kristi\.ttf", "handwriting", held=True),
    Family("breip", r"breip/Breip\.ttf", "handwriting", held=True),
    Family("tomsontalks", r"tomsontalks/TomsonTalks\.ttf", "handwriting", held=True),
)

# Files whose names do not spell their style.
_STYLE_BY_CODE = {
    "cmunrm": "regular", "cmunbx": "bold", "cmunti": "italic", "cmunbi": "bold italic", "cmunsl": "italic",
    "cmunss": "regular", "cmunsx": "bold", "cmunsi": "italic", "cmunso": "bold italic", "cmuntt": "regular",
    "cmuntb": "bold", "cmunst": "italic", "LinLibertine_R": "regular", "LinLibertine_RB": "bold",
    "LinLibertine_RI": "italic", "LinLibertine_RBI": "bold italic", "LinLibertine_DR": "regular",
    "LinBiolinum_R": "regular", "LinBiolinum_RB": "bold", "LinBiolinum_RI": "italic", "Gentium-R": "regular",
    "Gentium-I": "italic", "Anonymous Pro": "regular", "Anonymous Pro B": "bold", "Anonymous Pro I": "italic",
    "Anonymous Pro BI": "bold italic", "GFSNeohellenicBoldIt": "bold italic", "GFSNeohellenicIt": "italic",
}  # fmt: skip


def style_words(path: Path) -> str:
    """`bold`, `italic`, `bold italic`, `light` or `regular`, read from the file's name."""
    if path.stem in _STYLE_BY_CODE:
        return _STYLE_BY_CODE[path.stem]
    name = path.stem.split("-", 1)[-1] if "-" in path.stem else path.stem
    words = []
    if re.search(r"Bold|Black", name):
        words.append("bold")
    if re.search(r"Italic|Oblique", name):
        words.append("italic")
    if not words and "Light" in name:
        words.append("light")
    return " ".join(words) or "regular"


def fraction(key: str) -> float:
    """A stable number in [0, 1) from a string: decides what is held out, on every machine alike."""
    return zlib.crc32(key.encode()) / 2**32


@cache
def coverage(path: Path) -> frozenset[int]:
    """Code points for which the font file has a glyph."""
    return frozenset(TTFont(path, lazy=True).getBestCmap())


class DataRoot:
    """A directory into which the packages were unpacked with `dpkg -x`."""

    def __init__(self, root: Path) -> None:
        self.share = root / "usr" / "share"
        self.fonts_dir = self.share / "fonts"
        if not self.fonts_dir.is_dir():
            raise ValueError(
                f"DataRoot: root must hold unpacked Debian packages, got {root} without usr/share/fonts. "
                "Run the download commands of tools/embedded/README.md."
            )

    def fonts(self) -> list[Font]:
        """Text fonts of all families, in a fixed order."""
        files = sorted(p for p in self.fonts_dir.rglob("*") if p.suffix in (".ttf", ".otf"))
        found = []
        for family in FAMILIES:
            matching = [p for p in files if re.search(family.pattern + "$", p.as_posix())]
            if not matching:
                raise RuntimeError(f"DataRoot.fonts: family {family.name!r} has no file under {self.fonts_dir}.")
            found += [Font(p, family.name, family.kind, style_words(p), family.held) for p in matching]
        return found

    def symbol_fonts(self) -> list[Path]:
        """Fonts with symbols, best first."""
        names = ("ancient-scripts/Symbola_hint.ttf", "dejavu/DejaVuSans.ttf", "noto/NotoSansSymbols2-Regular.ttf",
                 "noto/NotoSansSymbols-Regular.ttf", "noto/NotoSansSymbols-Bold.ttf",
                 "noto/NotoSansMath-Regular.ttf", "dejavu/DejaVuMathTeXGyre.ttf")  # fmt: skip
        return [self.fonts_dir / "truetype" / n for n in names]

    def script_fonts(self, script: str) -> list[Path]:
        """Up to six Noto fonts of one script, called as in Unicode: sans and serif, regular first."""
        name = script.replace("_", "")
        files = []
        for face in ("Sans", "Serif"):
            for weight in ("Regular", "Bold", "Light"):
                files.append(self.fonts_dir / "truetype" / "noto" / f"Noto{face}{name}-{weight}.ttf")
        return [p for p in files if p.exists()]

    @property
    def emoji_font(self) -> Path:
        return self.fonts_dir / "truetype" / "noto" / "NotoColorEmoji.ttf"

    def emoji(self) -> Iterator[tuple[str, str, str, str]]:
        """Single-code-point emoji and country flags: (text, name, group, subgroup)."""
        group = subgroup = ""
        path = self.share / "unicode" / "emoji" / "emoji-test.txt"
        for line in path.read_text(encoding="utf8").splitlines():
            if line.startswith("# group:"):
                group = line.split(":", 1)[1].strip()
            elif line.startswith("# subgroup:"):
                subgroup = line.split(":", 1)[1].strip()
            elif "; fully-qualified" in line:
                points = [int(x, 16) for x in line.split(";")[0].split() if x != "FE0F"]
                name = re.split(r"E\d+\.\d+ ", line)[1]
                if len(points) == 1 or subgroup == "country-flag":
                    yield "".join(map(chr, points)), name, group, subgroup

    def emoji_keywords(self) -> dict[str, list[str]]:
        """CLDR keywords of each emoji, in English."""
        tree = ElementTree.parse(self.share / "unicode" / "cldr" / "common" / "annotations" / "en.xml")
        return {
            str(x.get("cp")): [w.strip() for w in (x.text or "").split("|")]
            for x in tree.getroot().iter("annotation")
            if x.get("type") != "tts"
        }

    def letters_by_script(self) -> dict[str, list[int]]:
        """Code points of the letters of every script of Unicode."""
        found: dict[str, list[int]] = {}
        pattern = re.compile(r"([0-9A-F]+)(?:\.\.([0-9A-F]+))?\s*;\s*(\w+) # (?:L[ulo&]|N[dl])")
        for line in (self.share / "unicode" / "Scripts.txt").read_text(encoding="utf8").splitlines():
            if match := pattern.match(line):
                first, last = int(match[1], 16), int(match[2] or match[1], 16)
                found.setdefault(match[3], []).extend(range(first, last + 1))
        return found

    def blocks(self) -> list[tuple[str, range]]:
        """Blocks of Unicode: (name, code points)."""
        text = (self.share / "unicode" / "Blocks.txt").read_text(encoding="utf8")
        lines = re.findall(r"^([0-9A-F]+)\.\.([0-9A-F]+); (.*)$", text, re.MULTILINE)
        return [(name.strip(), range(int(a, 16), int(b, 16) + 1)) for a, b, name in lines]


if __name__ == "__main__":
    print("\n".join(PACKAGES))

"""How long the sentences of README.md and docs are. Code, tables, formulas and headings do not count.

`python -m tools.prose` prints one row per page: words, sentences, the median and the longest sentence in words.
`python -m tools.prose --longer 25 docs/peft.md` prints the sentences of a page that are longer, with their line.
"""

import argparse
import re
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Sentence(NamedTuple):
    line: int
    """The line its paragraph begins on, from 1."""
    text: str

    @property
    def words(self) -> int:
        return len([word for word in self.text.split() if re.search(r"\w", word)])


def sentences(text: str) -> list[Sentence]:
    """The sentences of a Markdown page in order; a code span, a link's text and a formula count as what they show."""
    text = re.sub(r"<!--.*?-->", lambda found: "\n" * found.group().count("\n"), text, flags=re.DOTALL)
    found: list[Sentence] = []
    lines: list[str] = []
    begin = 0
    fence = ""

    def close() -> None:
        found.extend(Sentence(begin, sentence) for sentence in _split(" ".join(lines)))
        lines.clear()

    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if fence:
            fence = "" if bare.startswith(fence) else fence
            continue
        if opened := re.match(r"`{3,}|~{3,}|\$\$|\\\[", bare):
            close()
            one_line = len(bare) > 2 and opened.group() == "$$" and bare.endswith("$$")
            fence = "" if one_line or bare.endswith("\\]") else {"\\[": "\\]"}.get(opened.group(), opened.group())
            continue
        if not bare or re.match(r"[#|!<]|:::|!!!|={3,}|-{3,}", bare) or (line.startswith("    ") and not lines):
            close()
            continue
        if item := re.match(r"([*+-]|\d+[.)])\s+", bare):
            close()
            bare = bare[item.end() :]
        begin = begin if lines else number
        lines.append(bare)
    close()
    return found


def _split(paragraph: str) -> list[str]:
    paragraph = re.sub(
        r"`+([^`]*)`+", lambda span: "code" if " " in span.group(1) else span.group(1).replace(".", "_"), paragraph
    )
    paragraph = re.sub(r"\\\(.*?\\\)|\$[^$]+\$", "formula", paragraph)
    paragraph = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph).replace("**", "")
    paragraph = re.sub(r"\b(e\.g|i\.e|et al|vs|cf|resp|approx|Fig|Eq|Sec|No)\.", r"\1", paragraph)
    return [part for part in re.split(r"(?<=[.!?])[)\"”’*]*\s+(?=[^a-z\s]|[a-z])", paragraph) if part.strip()]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Words, sentences, median and longest sentence of README.md and docs.")
    parser.add_argument("--longer", type=int, metavar="WORDS", help="print the sentences with more words than this")
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files (README.md and docs/*.md unless given)")
    arguments = parser.parse_args()
    every: list[int] = []
    rows = []
    for page in arguments.pages or pages():
        all_of_page = sentences(page.read_text(encoding="utf-8"))
        lengths = [sentence.words for sentence in all_of_page]
        every += lengths
        rows.append((page.name, lengths))
        if arguments.longer:
            for sentence in all_of_page:
                if sentence.words > arguments.longer:
                    print(f"{page.name}:{sentence.line}: {sentence.words} words: {sentence.text}")
    if not arguments.longer:
        print(f"{'page':<24}{'words':>8}{'sentences':>11}{'median':>8}{'longest':>9}{'over 25':>9}")
        for name, lengths in [*rows, ("all", every)]:
            over = sum(length > 25 for length in lengths)
            row = f"{name:<24}{sum(lengths):>8}{len(lengths):>11}{median(lengths or [0]):>8g}"
            print(f"{row}{max(lengths, default=0):>9}{over:>9}")


if __name__ == "__main__":
    main()

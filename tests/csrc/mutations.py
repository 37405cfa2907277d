"""Every place in the kernels' sources where leaving out order or a bound would be a defect.

Order    ``__syncthreads``, ``__syncwarp``, ``cluster_sync``, ``copy_wait``, ``announce``, ``await``: left out.
Bounds   comparisons in device code, outside loop headers: ``a < b`` and ``a <= b`` become true, ``a > b`` and
         ``a >= b`` false (but ``a > 0`` true: it guards an access); ``min(a, b)`` becomes a or b, ``max(0, a)``
         becomes a.

All of them are planted in one copy of the sources, and a number chosen at run time says which one is active, so that
each source is compiled once. Only the side of ``#ifdef KEEPLORA_EMULATE`` that the emulator compiles counts.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ORDER = re.compile(r"(?:gpu::)?\b(__syncthreads|__syncwarp|cluster_sync|copy_wait|announce|await)\b(?:<[^;()]*>)?\(")
COMPARISON = re.compile(r" (<|<=|>|>=) ")
CLAMP = re.compile(r"\b(min|max)\(")


@dataclass(frozen=True)
class Mutation:
    """``file[start:end]``, an expression, becomes ``put`` when the mutation is active."""

    file: str  # under csrc
    line: int
    start: int
    end: int
    find: str
    put: str
    also: tuple["Mutation", ...] = ()  # other places of the file that become something else with it

    def __str__(self):
        return f"{self.file}:{self.line}: {self.key}"

    @property
    def key(self):
        return f"{' '.join(self.find.split())} -> {' '.join(self.put.split()) or 'nothing'}"


def plant(text, mutations, first):
    """The text with all the mutations; number ``first + i`` makes the i-th active."""
    parts = []
    for i, m in [(i, part) for i, whole in enumerate(mutations) for part in (whole, *whole.also)]:
        assert text[m.start : m.end] == m.find, f"{m} is not there"
        put = " ".join(m.put.split()) or "void()"
        # Of two that start in one place the longer opens first, of two that end in one place it closes last.
        size = m.end - m.start
        parts.append((m.start, 1, -size, -i, f"(planted::active({first + i}) ? ({put}) : ("))
        parts.append((m.end, 0, size, i, "))"))
    out, at = [], 0
    for place, *_, inserted in sorted(parts):
        out += [text[at:place], inserted]
        at = place
    return "".join([*out, text[at:]])


def closing(text, opening):
    """Where the bracket at ``opening`` ends."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise AssertionError("a bracket that never ends")


def blank(text, start, end):
    return text[:start] + re.sub(r"[^\n]", " ", text[start:end]) + text[end:]


def visible(text):
    """The text with spaces for what the emulator's compiler does not see: comments, strings, code for the GPU."""
    for pattern in (r"//[^\n]*", r"/\*.*?\*/", r'"(?:\\.|[^"\\\n])*"'):
        for match in re.finditer(pattern, text, re.S):
            text = blank(text, *match.span())
    stack, at = [], 0  # of: is this side of the condition compiled
    for line in text.splitlines(keepends=True):
        word = line.split()[:2]
        if word[:1] in (["#ifdef"], ["#ifndef"], ["#if"]):
            emulate = word[1:] == ["KEEPLORA_EMULATE"]
            stack.append(not (emulate and word[0] == "#ifndef"))
            flips = emulate
        elif word[:1] == ["#else"] and stack:
            stack[-1] = not stack[-1] if flips else stack[-1]
        elif word[:1] == ["#endif"] and stack:
            stack.pop()
        if line.lstrip().startswith("#") or not all(stack):
            text = blank(text, at, at + len(line))
        at += len(line)
    return text


def device_code(text):
    """The text with spaces outside the bodies of device functions, and in loop headers and compile-time conditions."""
    kept, at = blank(text, 0, len(text)), 0
    for match in re.finditer(r"\b__(?:device|global)__\b", text):
        if match.start() < at:
            continue
        body = match.end()
        while text[body] not in "{;":
            body = closing(text, body) + 1 if text[body] == "(" else body + 1
        constant = "constexpr" in text[match.end() : body]
        if text[body] == "{" and not constant:
            at = closing(text, body) + 1
            kept = kept[:body] + text[body:at] + kept[at:]
    for match in re.finditer(r"\b(?:for|while|static_assert|if constexpr|assert) ?\(", kept):
        kept = blank(kept, match.start(), closing(kept, match.end() - 1) + 1)
    return kept


def operand(text, at, step):
    """How far the operand of a comparison reaches from ``at`` (step 1: to the right, -1: to the left)."""
    depth, opens, closes = 0, *(("([{", ")]}") if step > 0 else (")]}", "([{"))
    while True:
        c = text[at]
        depth += (c in opens) - (c in closes)
        pair = text[at : at + 2] if step > 0 else text[at - 1 : at + 1]
        if depth < 0 or ((depth == 0 and (c in "?;,:=!" or pair in ("&&", "||"))) and pair != "::"):
            break
        if pair == "::":
            at += step
        at += step
    return at if step > 0 else at + 1


def mutations(csrc: Path, path: Path):
    text = path.read_text()
    code = visible(text)
    found = []

    def add(start, end, put):
        while text[start].isspace():
            start += 1
        end = start + len(text[start:end].rstrip())
        line = text.count("\n", 0, start) + 1
        found.append(Mutation(str(path.relative_to(csrc)), line, start, end, text[start:end], put))

    for match in ORDER.finditer(code):
        end = closing(code, match.end() - 1) + 1
        if code[end] == ";":  # a call, not a definition
            add(match.start(), end, "")
    device = device_code(code)
    for match in COMPARISON.finditer(device):
        start, end = operand(device, match.start(), -1), operand(device, match.end(), 1)
        if word := re.match(r"\s*return\b", device[start:end]):
            start += word.end()
        less = match[1] in ("<", "<=") or device[match.end() : end].strip() == "0"
        add(start, end, "true" if less else "false")
    for match in CLAMP.finditer(device):
        end = closing(device, match.end() - 1)
        comma = operand(device, match.end(), 1)
        sides = [device[match.end() : comma].strip(), device[comma + 1 : end].strip()]
        constant = [side for side in sides if re.fullmatch(r"k[A-Z]\w*(<\w+>)?|\d+", side)]
        if match[1] == "max":
            sides = sides[1:] if sides[0] == "0" else []
        for side in constant or sides if match[1] == "min" else sides:
            add(match.start(), end + 1, side)
    return sorted(found, key=lambda m: (m.start, -m.end))


def sources(csrc: Path):
    return sorted(p for p in (csrc / "kernels").rglob("*") if p.suffix in (".cu", ".cuh"))


def closure(folders: list[Path], path: Path):
    """``path`` and all files that it includes from these folders, directly or not."""
    seen, todo = set(), [path]
    while todo:
        file = todo.pop()
        if file not in seen and file.exists():
            seen.add(file)
            names = re.findall(r'#include "([^"]+)"', file.read_text())
            todo += [folder / name for folder in folders for name in names]
    return seen

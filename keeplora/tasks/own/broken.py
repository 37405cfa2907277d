"""Texts that no tokenizer takes, and names that no file system takes."""

from __future__ import annotations

import re
from pathlib import PurePath

from keeplora.tasks.own.forms import Talk

__all__ = ["broken", "broken_in", "broken_name"]

_HALF = re.compile("[\ud800-\udfff]")
_LONGEST = 255
"""Bytes of a name, in the file systems that are in use."""
_PATH = 4000
"""Bytes of a path; Linux has 4096, with the folder it begins in."""


def broken(text: str) -> str:
    r"""What keeps a text from being read: half a surrogate pair, which UTF-8 cannot hold, or a NUL. Else nothing.

    >>> broken("a\ud800"), broken("a\0"), broken("a\N{OWL}")
    ('half a surrogate pair, \\ud800', 'a NUL character', '')
    """
    if half := _HALF.search(text):
        return f"half a surrogate pair, \\u{ord(half[0]):04x}"
    return "a NUL character" if "\0" in text else ""


def broken_name(name: str) -> str:
    """What keeps a path from being looked for: what `broken` finds, or a part longer than a file system takes."""
    longest = max((len(part.encode("utf-8", "replace")) for part in PurePath(name).parts), default=0)
    whole = len(name.encode("utf-8", "replace"))
    long = f"a name of {longest} bytes" if longest > _LONGEST else f"a path of {whole} bytes" if whole > _PATH else ""
    return broken(name) or long


def broken_in(talk: Talk) -> str:
    """What is broken in a conversation, and where; nothing in an ordinary one."""
    for number, (pieces, answer) in enumerate(talk.turns, 1):
        for name, texts in (("question", pieces), ("answer", (answer,))):
            if why := next(filter(None, map(broken, texts)), ""):
                return f"{why} in {name} {number}"
    for kind, names in talk.files.items():
        if why := next(filter(None, map(broken_name, names)), ""):
            return f"{why} in the {kind}'s name"
    return ""

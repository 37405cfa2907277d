"""The pages that a reader meets first are in short sentences, by a count that is itself tested."""

import pytest
from pages import ROOT

from tools.prose import pages, sentences

FIRST = ["README.md", *(f"docs/{name}.md" for name in ("index", "first-steps", "install", "vlm"))]
FIRST += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("which-*.md"))


def test_sentences_of_prose_are_counted_and_nothing_else():
    page = """# A heading of four

One `code span with words` and [a link](https://a.b/c.d) end, see Hu et al. 2021.
It goes on (in brackets.) And here: a third!

| no | table |
|---|---|

* An item that is
  two lines.
* Another one without an end

```python
print("no. code. at. all.")
```

    an indented command

$$ x = 1. $$

<!-- no. comment. -->
Last one with 0.5 points.
"""
    assert [(sentence.line, sentence.words) for sentence in sentences(page)] == [
        (3, 11),
        (3, 5),
        (3, 4),
        (9, 6),
        (11, 5),
        (22, 5),
    ]


@pytest.mark.parametrize("name", FIRST)
def test_no_sentence_of_the_first_pages_is_longer_than_25_words(name):
    long = [sentence for sentence in sentences((ROOT / name).read_text(encoding="utf-8")) if sentence.words > 25]
    assert not long


def test_every_page_is_counted():
    names = {page.name for page in pages()}
    assert {"README.md", "compare.md", "methods.md"} <= names
    assert all(sentences(page.read_text(encoding="utf-8")) for page in pages())

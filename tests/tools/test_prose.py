"""README.md and all pages of docs are in short sentences, by a count that is itself tested."""

import pytest

from tools.prose import pages, sentences


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


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_no_sentence_is_longer_than_25_words(page):
    every = sentences(page.read_text(encoding="utf-8"))
    assert every
    assert [sentence for sentence in every if sentence.words > 25] == []

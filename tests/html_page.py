"""A page of HTML as a test reads it."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page consists of: (tag, attributes) in order, headings, tables as rows of texts, and all its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.headings, self.tables, self.words = [], [], {}, []
        self._rows, self._cell, self._caption, self._heading = None, None, None, None
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = ""
        elif tag == "caption":
            self._caption = ""
        elif re.fullmatch("h[1-6]", tag):
            self._heading = ""

    def handle_data(self, data):
        self.words.append(data)
        for part in ("_cell", "_caption", "_heading"):
            if getattr(self, part) is not None:
                setattr(self, part, getattr(self, part) + data)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._rows[-1].append(self._cell)
            self._cell = None
        elif tag == "caption":
            self.tables[self._caption], self._caption = self._rows, None
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), self._heading))
            self._heading = None

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, start):
        [rows] = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return rows

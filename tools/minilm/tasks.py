"""What the text tasks are: class names, and which part of WordNet belongs to each."""

from __future__ import annotations

Member = tuple[str, str | int] | tuple[str, str, int]
"""("file", number of a lexicographer file), ("topic", word) or ("under", noun, number of its lexicographer file)."""


def _under(file: int, *words: str) -> dict[str, Member]:
    return {word: ("under", word, file) for word in words}


def _topics(*words: str) -> dict[str, Member]:
    return {word: ("topic", word) for word in words}


_ANIMAL, _ARTIFACT, _FOOD, _PERSON, _PLANT = 5, 6, 13, 18, 20

TASKS: dict[str, dict[str, Member]] = {
    "animals": _under(
        _ANIMAL, "bird", "fish", "insect", "reptile", "mollusk", "carnivore", "rodent", "ungulate", "amphibian",
        "arachnid",
    ),
    "actions": {
        "motion": ("file", 38), "touching": ("file", 35), "care of the body": ("file", 29), "change": ("file", 30),
        "creation": ("file", 36), "eating and drinking": ("file", 34), "perception": ("file", 39),
    },
    "people": _under(
        _PERSON, "scientist", "artist", "athlete", "ruler", "serviceman", "writer", "musician", "wrongdoer",
        "religious person", "politician", "deity", "relative",
    ),
    "subjects": _topics(
        "law", "military", "music", "chemistry", "computer science", "Greek mythology", "biology", "physics",
        "mathematics", "medicine", "sport", "linguistics",
    ),
    "things": _under(
        _ARTIFACT, "vehicle", "clothing", "weapon", "building", "furniture", "container", "musical instrument",
        "fabric", "tool", "medicine", "measuring instrument",
    ),
    "minds": {
        "thinking": ("file", 31), "communication": ("file", 32), "emotion": ("file", 37),
        "social interaction": ("file", 41), "possession": ("file", 40), "competition and fighting": ("file", 33),
        "being": ("file", 42),
    },
    "edible": {
        **_under(_PLANT, "tree", "shrub", "fern", "grass", "vine", "fungus"),
        **_under(_FOOD, "beverage", "dish", "edible fruit", "vegetable", "meat", "bread"),
    },
    "ideas": {
        "act": ("file", 4), "event": ("file", 11), "state": ("file", 26), "process": ("file", 22),
        "feeling": ("file", 12), "knowledge": ("file", 9), "attribute": ("file", 7), "quantity": ("file", 23),
        "time": ("file", 28), "group": ("file", 14), "place": ("file", 15), "shape": ("file", 25),
    },
}  # fmt: skip
"""In learning order, general kinds of words between concrete ones, as the order of MTIL mixes domains."""

WITNESS: dict[str, dict[str, Member]] = {
    "nature": {
        "part of the body": ("file", 8), "substance": ("file", 27), "natural object": ("file", 17),
        "phenomenon": ("file", 19), "message": ("file", 10), "property owned": ("file", 21), "weather": ("file", 43),
        "relation": ("file", 24),
    }
}  # fmt: skip
"""Never trained."""

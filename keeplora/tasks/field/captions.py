"""Reference captions in COCO's form, as UCIT has them for Flickr30k and VizWiz."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from keeplora._messages import listed
from keeplora._untrusted import fault, parse_json, read_bytes
from keeplora.methods.settings import ConfigError

from .instructions import Question

__all__ = ["read_captions"]

_MOST = 2**30
_FEW = 0.01
"""Share of the images that may lack a caption: the old VizWiz file lacks one of 3000."""


def read_captions(path: str | Path, test: Sequence[Question]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The reference captions of each test question, by its id, and notes on what is not as it should be.

    ``image_id`` is the position of the question in the test file, from 1. An old file of VizWiz has 2999 ids for 3000
    images: a question without captions is told, and is not in the result, as in the public score.

    Raises:
        ConfigError: the file is none of COCO's form, or more than 1 % of the questions have no caption.
    """
    try:
        table = parse_json(read_bytes(path, most=_MOST))
    except (OSError, ValueError) as error:
        raise ConfigError(f"read_captions: {path} must {fault(error)}") from None
    try:
        ids = [int(image["id"]) for image in table["images"]]
        rows = [(int(row["image_id"]), str(row["caption"])) for row in table["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"read_captions: {path} must have images with an id, and annotations with image_id and caption, "
            f"got {error!r}. Take the benchmark's file of COCO's form"
        ) from None
    captions: dict[int, list[str]] = defaultdict(list)
    for position, caption in rows:
        captions[position].append(caption)
    notes = []
    if len(set(ids)) != len(test):
        notes.append(f"{path} has {len(set(ids))} image ids for {len(test)} images of the test")
    bare = [each.id for i, each in enumerate(test, 1) if not captions.get(i)]
    if len(bare) > _FEW * len(test):
        raise ConfigError(
            f"read_captions: {path} must have captions for every question, got none for {len(bare)} of {len(test)}. "
            "Its image_id must be the question's position in the test file, from 1"
        )
    if bare:
        notes.append(f"{len(bare)} of {len(test)} images have no reference caption and are not scored: {listed(bare)}")
    return {each.id: captions[i] for i, each in enumerate(test, 1) if captions.get(i)}, tuple(notes)

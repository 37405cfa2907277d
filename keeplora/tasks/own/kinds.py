"""The kinds of faults in data: what each means, and what may be done about it."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FAULTS", "MEANINGS"]

FAULTS: Mapping[str, tuple[str, ...]] = {
    "corrupt": ("refuse", "skip"),
    "not_image": ("refuse", "skip"),
    "loose": ("refuse", "skip"),
    "depth": ("refuse", "skip"),
    "grey": ("refuse", "skip", "convert"),
    "alpha": ("refuse", "skip", "convert"),
    "animated": ("refuse", "skip", "convert"),
    "empty_class": ("refuse", "skip"),
    "missing": ("refuse", "skip"),
    "empty_answer": ("refuse", "skip"),
    "broken_text": ("refuse", "skip"),
    "special_token": ("refuse", "skip"),
    "long_text": ("refuse", "cut"),
    "overlap": ("refuse", "allow"),
}
"""What can be wrong with data, and what may be done about it; the first is the default.

* ``corrupt``: an image or video that cannot be decoded, empty files too.
* ``not_image``: a file in a class folder that is none.
* ``loose``: an image beside the class folders, of no class.
* ``depth``: more than 8 bits a channel (``I;16``, ``I``, ``F``), which no conversion of Pillow scales.
* ``grey``: no colours. ``convert`` repeats the channel.
* ``alpha``: transparency. ``convert`` drops it, as ``Image.convert("RGB")`` does.
* ``animated``: several frames. ``convert`` takes the first.
* ``empty_class``: a class folder that holds no image.
* ``missing``: a file that the annotations name and that is not there.
* ``empty_answer``: a sample without a question or without an answer.
* ``broken_text``: a sample with half a surrogate pair or a NUL in a text or a file's name, or a name that is too long.
* ``special_token``: a sample whose words are special tokens of the model, or marks of its chat template: ``</s>``.
* ``long_text``: a text longer than the model's context. ``cut`` leaves its end out, as tokenizers do unasked.
* ``overlap``: two tasks have a class of the same name.
"""
MEANINGS = {
    "corrupt": "cannot be decoded",
    "not_image": "are no images",
    "loose": "lie beside the class folders",
    "depth": "have more than 8 bits a channel",
    "grey": "are grey",
    "alpha": "have transparency",
    "animated": "have several frames",
    "empty_class": "are class folders without an image",
    "missing": "are named by annotations and not there",
    "empty_answer": "are samples without question or answer",
    "broken_text": "are samples with a text or a name that cannot be read",
    "special_token": "are samples with special tokens of the model in their words",
    "long_text": "are texts longer than the model's context",
    "overlap": "are classes that two tasks share",
}
"""What is said of things of a kind, after their number."""

"""The tokenizer: ids, spelling out, cutting, round trips."""

import pytest
import torch

from keeplora.tasks.embedded.tokenizer import Tokenizer

TEXTS = ["greek letter alpha", "greek letter beta", "red heart", "red circle"]


def make(context=8):
    return Tokenizer.from_texts(TEXTS, context=context, least=2)


def test_known_words_are_one_token_and_others_are_spelled():
    tokenizer = make()
    assert tokenizer.decode(tokenizer(["Greek  LETTER, red!"])[0]) == "greek letter red"
    assert tokenizer.decode(tokenizer(["red sun"])[0]) == "red s u n"


def test_end_has_the_highest_id_and_is_kept_when_cut():
    tokenizer = make(context=5)
    rows = tokenizer(["red", "elephant", ""])
    assert rows.dtype == torch.int64
    assert rows.shape == (3, 5)
    assert rows.max() == len(tokenizer) - 1
    assert rows.argmax(1).tolist() == [2, 4, 1]
    assert rows[0, 3:].tolist() == [0, 0]


def test_stored_vocabulary_gives_the_same_ids(tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path / "vocab.json")
    assert torch.equal(Tokenizer.load(tmp_path / "vocab.json")(TEXTS), tokenizer(TEXTS))


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"texts .*got 'red'"):
        make()("red")
    with pytest.raises(ValueError, match="words must be distinct"):
        Tokenizer(["<pad>", "a", "<end>"], 8)
    with pytest.raises(ValueError, match="context must be at least 3"):
        make(context=2)

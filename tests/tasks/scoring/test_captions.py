"""Caption metrics against what the public scripts' Java programs gave for the same captions."""

import os

import pytest

from keeplora.methods.settings import ConfigError
from keeplora.tasks.scoring import caption_score

TEXTS = {
    "a": "A man's dog isn't running (fast). It \"jumps\" over 3.5 hurdles, U.S. style - really!",
    "c": "a boy is playing with a red ball",
    "d": "people walking on streets in the rain",
    "e": "Quality issues are too severe to recognize visual content.",
}
REFERENCES = {
    "a": ["A dog runs fast and jumps over hurdles.", "the dog of a man jumps high", "a dog jumping"],
    "c": ["A child plays with a red ball.", "the boy plays ball"],
    "d": ["A crowd of people walks down the street in rain.", "people with umbrellas"],
    "e": ["Quality issues are too severe to recognize visual content.", "a blurry photo of a box"],
}
PUBLIC = {
    "BLEU-1": 61.9048,
    "BLEU-2": 46.0195,
    "BLEU-3": 38.2721,
    "BLEU-4": 33.8186,
    "METEOR": 40.7603,
    "ROUGE-L": 63.4362,
    "CIDEr": 209.0446,
}
"""pycocoevalcap 1.2 with its tokenizer and METEOR 1.5 on OpenJDK 17."""


def test_bleu_rouge_and_cider_are_the_public_ones():
    score = caption_score(TEXTS, REFERENCES)
    assert set(score.parts) == set(PUBLIC)
    for name in PUBLIC.keys() - {"METEOR"}:
        assert score.parts[name] == pytest.approx(PUBLIC[name], abs=1e-3), name
    # NLTK's finds no synonyms and weighs all words alike; with its own default weights it would be over 70 here.
    assert score.parts["METEOR"] == pytest.approx(PUBLIC["METEOR"], abs=3)
    assert score.percent == pytest.approx(sum(score.parts.values()) / 7)


def test_the_result_says_what_differs():
    score = caption_score(TEXTS, REFERENCES)
    assert "Treebank" in str(score)
    assert "METEOR by NLTK" in str(score)
    assert "4 answers" in str(score)


@pytest.mark.skipif("KEEPLORA_TEST_JAVA" not in os.environ, reason="a minute of Java: set KEEPLORA_TEST_JAVA=1")
def test_with_java_all_seven_are_the_public_ones():
    score = caption_score(TEXTS, REFERENCES, java=True)
    assert score.parts == pytest.approx(PUBLIC, abs=1e-3)
    assert score.notes == ()


def test_a_text_is_cut_to_300_characters():
    long = {**TEXTS, "c": TEXTS["c"] + " and" * 100}
    cut = {**TEXTS, "c": (TEXTS["c"] + " and" * 100)[:300]}
    assert caption_score(long, REFERENCES).parts == caption_score(cut, REFERENCES).parts
    assert caption_score(long, REFERENCES).percent < caption_score(TEXTS, REFERENCES).percent


def test_right_captions_score_high_and_none_scores_0():
    same = {name: captions[0] for name, captions in REFERENCES.items()}
    alone = {name: captions[:1] for name, captions in REFERENCES.items()}
    parts = caption_score(same, alone).parts
    assert all(parts[name] == pytest.approx(100, abs=1e-4) for name in ("BLEU-1", "BLEU-4", "ROUGE-L"))
    assert parts["CIDEr"] == pytest.approx(1000, abs=1e-6)
    # One chunk of m matches costs 0.6 (1 / m)^0.2 in METEOR, here of 7, 6, 9 and 9 words.
    lengths = [len(captions[0].split()) for captions in alone.values()]
    assert parts["METEOR"] == pytest.approx(sum(100 * (1 - 0.6 * m**-0.2) for m in lengths) / 4)
    assert caption_score(dict.fromkeys(TEXTS, ""), REFERENCES).percent == pytest.approx(0, abs=1e-3)


def test_cider_of_one_image_is_told():
    score = caption_score({"c": TEXTS["c"]}, {"c": REFERENCES["c"]})
    assert score.parts["CIDEr"] == 0
    assert "CIDEr is 0 for a single image" in str(score)


@pytest.mark.parametrize(
    ("texts", "references", "message"),
    [
        ({}, {}, "texts must hold at least one, got none"),
        ({"a": "x"}, {"a": ["x"], "b": ["y"]}, r"same images, got 'b' in one of them only \(1 in all\)"),
        ({"a": "x"}, {"a": []}, r"references must hold a list of captions for each image, got \[\] for 'a'"),
        ({"a": "x"}, {"a": "x"}, "got 'x' for 'a'"),
    ],
)
def test_wrong_captions_are_refused(texts, references, message):
    with pytest.raises(ConfigError, match=message):
        caption_score(texts, references)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("keeplora.tasks.scoring.captions.shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"java must be on PATH with java=True"):
        caption_score(TEXTS, REFERENCES, java=True)
    monkeypatch.setattr("keeplora.tasks.scoring.captions.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"pycocoevalcap must be installed, got none. Run pip install 'keeplora\[inst"
    ):
        caption_score(TEXTS, REFERENCES)

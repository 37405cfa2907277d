"""Every branch of the rules by which answers are right or wrong."""

import pytest

from keeplora.methods.settings import ConfigError
from keeplora.tasks.scoring import (
    Prediction,
    exact_match,
    exact_match_score,
    judged_score,
    mllm_dcl_prompt,
    mllm_dcl_score,
    mllm_dcl_share,
)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("goldfish", "goldfish", True),
        (" Goldfish\n", "goldfish", True),
        ("GOLDFISH", "Goldfish", True),
        ("goldfish.", "goldfish", False),
        ("a goldfish", "goldfish", False),
        ("goldfish", " goldfish", False),  # white space goes from the text, not from the answer
        ("", "goldfish", False),
    ],
)
def test_ucit(text, answer, right):
    assert exact_match(text, answer) is right


MAP = {"question": "Which states are red?", "image": "Sci/images/MapQA_1.png"}
RULES = [
    # RS and AD, an answer of several words
    ("RS", "it is a river bank.", "River bank", {}, 1),
    ("RS", "a river", "River bank", {}, 0),
    # an answer of one word, a text of several: " a", "a ", "a." or "a,"
    ("RS", "there is no river", "River", {}, 1),
    ("RS", "river on top", "River.", {}, 1),
    ("RS", "two:river. that is all", "river", {}, 1),
    ("RS", "two:river, on top", "river", {}, 1),
    ("RS", "two:rivers on top", "river", {}, 0),
    ("RS", "a lake on top", "river", {}, 0),
    # a text of one word holds it
    ("RS", "rivers", "river", {}, 1),
    ("RS", "lake", "river", {}, 0),
    ("AD", "turn Left", "left", {}, 1),
    ("AD", "right", "left", {}, 0),
    # Med
    ("Med", "In the left LUNG, I think", "lung", {}, 1),
    ("Med", "heart", "lung", {}, 0),
    # Sci: equality by the file's name
    ("Sci", "b", "B", {"image": "Sci/images/AI2D_1.png"}, 1),
    ("Sci", "b.", "B", {"image": "Sci/images/AI2D_1.png"}, 0),
    ("Sci", "b.", "B", {"image": "images/TQA_1.png"}, 0),
    ("Sci", "b.", "B", {"image": "VQA_1.png"}, 0),
    ("Sci", "b.", "B", {"image": "Sci/images/SciVerse_1.png"}, 0),
    ("Sci", "b.", "B", {"image": "Sci/AI2D_folder/map.png"}, 1),  # the file's name, not the folder's
    ("Sci", "b.", "B", {"image": "Sci/images/AI2Dx.png"}, 1),
    # the share of states
    ("Sci", "ohio,utah", "Utah,Ohio", MAP, 1),
    ("Sci", "ohio,iowa", "Utah,Ohio", MAP, 0.5),
    ("Sci", "ohio, utah", "Utah,Ohio", MAP, 0.5),  # " utah" is not "utah", as in the public script
    ("Sci", "iowa", "Utah,Ohio", MAP, 0),
    # other maps
    ("Sci", "the answer is 3.", "3", {"question": "How many?", "image": "Sci/images/MapQA_1.png"}, 1),
    ("Sci", "the answer is 4.", "3", {"question": "How many?", "image": "Sci/images/MapQA_1.png"}, 0),
    # Fin
    ("Fin", " B. ", "B", {}, 1),
    ("Fin", "Yes.", "yes", {}, 1),
    ("Fin", "B because", "B", {}, 0),
    ("Fin", "B)", "B", {}, 0),
    # nobody gets a point for not answering
    *((domain, "Unanswerable a", "a", {}, 0) for domain in ("RS", "Med", "AD", "Sci")),
    ("Fin", "Unanswerable", "unanswerable", {}, 0),
    ("Sci", "unanswerable", "unanswerable", {"image": "AI2D_1.png"}, 0),
]


@pytest.mark.parametrize(("domain", "text", "answer", "where", "share"), RULES)
def test_mllm_dcl(domain, text, answer, where, share):
    assert mllm_dcl_share(domain, Prediction(text, answer, **where)) == share


def test_all_predictions_are_in_the_denominator():
    score = mllm_dcl_score("Med", [Prediction("lung", "lung"), Prediction("Unanswerable", "x"), Prediction("y", "z")])
    assert score.percent == pytest.approx(100 / 3)
    assert (score.count, score.metric) == (3, "MLLM-DCL Med")
    assert exact_match_score([Prediction("a", "A"), Prediction("b", "A")]).percent == 50


@pytest.mark.parametrize(
    ("domain", "answer", "ending"),
    [
        ("RS", "x", "What?"),
        ("AD", "x", "What?"),
        ("Sci", "x", "What?"),
        ("Med", "x", "What? Answer the question with a single word (or phrase)."),
        ("Fin", "Yes", "What? Only answer with yes or no directly."),
        ("Fin", "no.", "What? Only answer with yes or no directly."),
        ("Fin", "B", "What? Answer with the given letter directly, e.g., A, B, C, D."),
    ],
)
def test_prompts(domain, answer, ending):
    assert mllm_dcl_prompt(domain, "What?", answer) == ending


@pytest.mark.parametrize("call", [mllm_dcl_share, lambda domain, p: mllm_dcl_prompt(domain, "a", "b")])
def test_an_unknown_domain_is_named(call):
    with pytest.raises(
        ConfigError, match=r"domain must be one of RS, Med, AD, Sci, Fin, got 'Fim'. Did you mean 'Fin'"
    ):
        call("Fim", Prediction("a", "b"))


def test_without_a_judge_it_is_exact_match_and_says_so():
    score = judged_score([Prediction("3", "3"), Prediction("three", "3")])
    assert (score.percent, score.metric, score.count) == (50, "greedy exact match", 2)
    assert "does not compare" in str(score)


def test_a_judge_sees_all_and_its_mark_counts():
    seen = []

    def judge(question, answer, text):
        seen.append((question, answer, text))
        return 5 if answer in text else 1

    score = judged_score([Prediction("3 cars", "3", "How many?"), Prediction("two", "4")], judge, name="mine")
    assert seen == [("How many?", "3", "3 cars"), ("", "4", "two")]
    assert (score.percent, score.metric, score.notes) == (pytest.approx(60), "judge mine", ())


@pytest.mark.parametrize("mark", [-1, 5.5, float("nan")])
def test_a_wrong_mark_is_refused(mark):
    with pytest.raises(ConfigError, match=f"judge must give 0 to 5, got {mark}"):
        judged_score([Prediction("3", "3")], lambda *texts: mark, name="mine")


def test_a_judge_has_a_name():
    with pytest.raises(ConfigError, match="a judge without a name"):
        judged_score([Prediction("3", "3")], lambda *texts: 5)
    with pytest.raises(ConfigError, match="the name 'x' without a judge"):
        judged_score([Prediction("3", "3")], name="x")


@pytest.mark.parametrize("score", [exact_match_score, judged_score, lambda none: mllm_dcl_score("RS", none)])
def test_nothing_is_no_score(score):
    with pytest.raises(ConfigError, match="predictions must hold at least one, got none"):
        score([])

"""MLLM-DCL: one rule and one prompt for each domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from keeplora._messages import suggest
from keeplora.methods.settings import ConfigError

from .prediction import Prediction, Score, mean_percent

__all__ = ["DOMAINS", "mllm_dcl_prompt", "mllm_dcl_score", "mllm_dcl_share"]

_EXACT_FILES = ("AI2D", "TQA", "VQA", "SciVerse")


def mllm_dcl_prompt(domain: str, question: str, answer: str) -> str:
    """The question as the model is asked it: Med and Fin say in what form to answer.

    Args:
        answer: The right one. Fin asks in another form where it is yes or no.

    Raises:
        ConfigError: there is no such domain.

    Examples:
        >>> mllm_dcl_prompt("Fin", "Does it rise?", "Yes")
        'Does it rise? Only answer with yes or no directly.'
    """
    _rule("mllm_dcl_prompt", domain)
    if domain == "Med":
        return f"{question} Answer the question with a single word (or phrase)."
    if domain == "Fin":
        yes_or_no = answer.strip().rstrip(".").lower() in ("yes", "no")
        form = "Only answer with yes or no" if yes_or_no else "Answer with the given letter"
        return f"{question} {form} directly{'.' if yes_or_no else ', e.g., A, B, C, D.'}"
    return question


def mllm_dcl_share(domain: str, prediction: Prediction) -> float:
    """How right a prediction is: 0 or 1, or a share where several states are asked for.

    | domain | right when |
    |---|---|
    | RS, AD | the answer has a space: it is in the text; else the answer ``a`` without ``.``: a text of several words has ``" a"``, ``"a "``, ``"a."`` or ``"a,"``; a text of one word has ``a`` |
    | Med | the answer is in the text |
    | Sci | files ``AI2D_ TQA_ VQA_ SciVerse_``: they are equal; "Which states": share of the comma-split answers among the comma-split texts; else the answer is in the text |
    | Fin | the text without spaces and ``.`` equals the answer |

    Both are lower-cased first. A text with "unanswerable" is wrong. States are compared as split, spaces included, as
    the public script does: "texas, ohio" does not hold " texas".

    Raises:
        ConfigError: there is no such domain.

    Source: MLLM-CL's and MCITlib's evaluation scripts.

    Examples:
        >>> mllm_dcl_share("Sci", Prediction("ohio,utah", "Ohio,Iowa", "Which states are red?", "Sci/images/map_1.png"))
        0.5
    """  # noqa: E501
    rule = _rule("mllm_dcl_share", domain)
    text, answer = prediction.text.lower(), prediction.answer.lower()
    return 0.0 if "unanswerable" in text else float(rule(text, answer, prediction))


def mllm_dcl_score(domain: str, predictions: Sequence[Prediction]) -> Score:
    """The mean of [`mllm_dcl_share`][] over all predictions, in percent.

    Raises:
        ConfigError: there is no such domain, or no prediction.

    Examples:
        >>> print(mllm_dcl_score("Med", [Prediction("the left lung", "Lung"), Prediction("Unanswerable", "heart")]))
        50.00 (MLLM-DCL Med, 2 answers)
    """
    _rule("mllm_dcl_score", domain)
    percent = mean_percent("mllm_dcl_score", predictions, lambda each: mllm_dcl_share(domain, each))
    return Score(percent, f"MLLM-DCL {domain}", len(predictions))


def _words(text: str, answer: str, prediction: Prediction) -> float:
    if " " in answer:
        return answer in text
    answer = answer.replace(".", "")
    if " " in text:
        return any(sign in text for sign in (f" {answer}", f"{answer} ", f"{answer}.", f"{answer},"))
    return answer in text


def _contained(text: str, answer: str, prediction: Prediction) -> float:
    return answer in text


def _science(text: str, answer: str, prediction: Prediction) -> float:
    if PurePosixPath(prediction.image).name.startswith(tuple(f"{name}_" for name in _EXACT_FILES)):
        return text == answer
    if "which states" in prediction.question.lower():
        wanted, told = answer.split(","), text.split(",")
        return sum(state in told for state in wanted) / len(wanted)
    return answer in text


def _letter(text: str, answer: str, prediction: Prediction) -> float:
    return text.replace(" ", "").replace(".", "") == answer


DOMAINS: dict[str, Callable[[str, str, Prediction], float]] = {
    "RS": _words,
    "Med": _contained,
    "AD": _words,
    "Sci": _science,
    "Fin": _letter,
}
"""The rule of each domain, in the benchmark's order."""


def _rule(function: str, domain: str) -> Callable[[str, str, Prediction], float]:
    if domain not in DOMAINS:
        raise ConfigError(
            f"{function}: domain must be one of {', '.join(DOMAINS)}, got {domain!r}{suggest(domain, DOMAINS)}"
        )
    return DOMAINS[domain]

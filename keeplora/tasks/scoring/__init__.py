"""How the instruction benchmarks score what a model wrote: one file for each family of rules."""

from .captions import CaptionScore, caption_score
from .exact import exact_match, exact_match_score
from .judged import Judge, judged_score
from .mllm_dcl import DOMAINS, mllm_dcl_prompt, mllm_dcl_score, mllm_dcl_share
from .prediction import Prediction, Score

__all__ = [
    "DOMAINS",
    "CaptionScore",
    "Judge",
    "Prediction",
    "Score",
    "caption_score",
    "exact_match",
    "exact_match_score",
    "judged_score",
    "mllm_dcl_prompt",
    "mllm_dcl_score",
    "mllm_dcl_share",
]

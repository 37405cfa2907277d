"""What commands of the command line take, and how their help is shown."""

from __future__ import annotations

import argparse
import textwrap

__all__ = ["Help", "count", "plan_arguments", "positive", "run_arguments"]


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions are wrapped; examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def run_arguments(parser: argparse.ArgumentParser, *, default_out: str, methods: str | None = None) -> None:
    """Of the commands that train: where results go, which methods, how many at a time."""
    parser.add_argument("--out", metavar="FOLDER", help=f"where results go (default: {default_out})")
    parser.add_argument("--workers", type=count, metavar="N", help="runs at the same time; 0: one, in this process")
    parser.add_argument(
        "--accept-versions", action="store_true", help="go on in a folder begun with another keeplora or torch"
    )
    parser.add_argument(
        "--evaluate-anew", action="store_true", help="evaluate again what the folder has evaluated already"
    )
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", default=[], help="your modules that register methods")
    only = (
        "only these, e.g. lora keeplora++; all: every method that suits the model"
        if methods is None
        else f"methods, groups, variants (default: {methods})"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help=only, default=None if methods is None else [methods]
    )


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What `keeplora plan` takes."""
    parser.add_argument(
        "model", metavar="MODEL", help="a shipped config (llava-1.5-7b, …), config.json, folder or model id"
    )
    parser.add_argument("--rank", type=positive, default=16, metavar="R", help="rank of the adapters (default: 16)")
    parser.add_argument(
        "--targets", nargs="+", default=["all-linear"], metavar="NAME", help="target_modules (default: all-linear)"
    )
    parser.add_argument("--method", default="keeplora++", metavar="NAME", help="keeplora, keeplora++ (default) or lora")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="dtype of the weights (default: bfloat16)",
    )
    parser.add_argument(
        "--bits", type=int, choices=[4, 8], help="plan for adapted weights quantised to 4 or 8 bits, on one GPU"
    )
    parser.add_argument(
        "--no-merge", action="store_true", help="plan for updates kept beside weights (merge=False), on one GPU"
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="sequences per step and GPU (default: 1)"
    )
    parser.add_argument(
        "--length", type=positive, default=1024, metavar="N", help="tokens per sequence (default: 1024)"
    )
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="plan for one card and for N (default: 8; 1 with --bits, --no-merge)",
    )
    parser.add_argument(
        "--card",
        type=positive,
        nargs="+",
        default=[24, 48, 80],
        metavar="GB",
        help="memory of the cards in GB (default: 24 48 80)",
    )
    parser.add_argument(
        "--gpu", default="H100", metavar="NAME", help="the GPU whose rates count: H200, H100 (default), A100, 4090"
    )
    parser.add_argument("--budget", type=positive, metavar="GB", help="memory_budget in GB (default: by the card)")
    parser.add_argument(
        "--batches", type=positive, default=100, metavar="N", help="batches of a pass over the data (default: 100)"
    )
    parser.add_argument(
        "--weight-share",
        type=float,
        nargs="+",
        metavar="X",
        help="protected share of every weight's directions, low and high (default: 0.13 0.30)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="count activations as with gradient checkpointing")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _at_least(1, text)


def count(text: str) -> int:
    """A whole number from 0 on."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text}")
    return int(text)

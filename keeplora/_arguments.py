"""What several commands of the command line take."""

from __future__ import annotations

import argparse

__all__ = ["count", "positive", "run_arguments"]


def run_arguments(parser: argparse.ArgumentParser, *, default_out: str, methods: str | None = None) -> None:
    """Of the commands that train: where results go, which methods, how many at a time."""
    parser.add_argument("--out", metavar="FOLDER", help=f"where results go (default: {default_out})")
    parser.add_argument("--workers", type=count, metavar="N", help="runs at the same time; 0: in this process")
    parser.add_argument(
        "--accept-versions", action="store_true", help="go on in a folder begun with another keeplora or torch"
    )
    parser.add_argument(
        "--evaluate-anew", action="store_true", help="look up no evaluation that the folder has of the same weights"
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


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text}")
    return value


def count(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text}")
    return int(text)

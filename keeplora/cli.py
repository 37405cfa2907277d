"""The command line: arguments to calls, no logic."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from keeplora._arguments import Help, plan_arguments, positive, run_arguments
from keeplora._version import __version__

_EXAMPLES = """examples:
  keeplora demo                                   the embedded benchmark, five methods, three seeds
  keeplora demo --methods lora keeplora++ --seeds 1
  keeplora run quick                              a shipped configuration
  keeplora init data                              your own data: look at it, write tasks.toml for keeplora run
  keeplora run tasks.toml --dry-run               your own tasks: check the data, estimate time and memory
  keeplora run tasks.toml --export                learn them; write models and PEFT adapters
  keeplora compare --budget small                 every method, small; --budget full for the whole table
  keeplora compare --methods lora mine --plugins my_methods    a method that your my_methods.py registers
  keeplora report runs/demo                       one HTML file about a run, or about several side by side
  keeplora plan llava-1.5-7b                      does a model fit? bytes and seconds of each phase
  keeplora info                                   versions, kernels, methods, benchmarks

Ctrl-C stops a run; the same command continues it. Finished runs are never repeated.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 1 where a run failed or a report has left out what it could not read; 2 for bad input; 130 after Ctrl-C, 143
    after SIGTERM.
    """
    parsed = _parser().parse_args(arguments)
    if arguments is None and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # modules of the user's own are here, as for python -m; workers inherit it
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        with _terminable():
            return command(parsed)
    except KeyboardInterrupt as stop:
        print("keeplora: stopped. The same command continues where it was.", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    except BrokenPipeError:  # the reader of our output left, as in `keeplora info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _complain(error, 2)
    except Exception as error:
        from keeplora.compare.pool import WorkerError
        from keeplora.methods import StateError  # here, so that --help is quick
        from keeplora.methods.settings import ConfigError
        from keeplora.train.loop import NonFiniteLossError

        if isinstance(error, ConfigError | StateError):
            return _complain(error, 2)
        if isinstance(error, WorkerError | NonFiniteLossError):
            return _complain(error, 1)
        raise


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which job schedulers and containers send, ends a command as Ctrl-C does."""


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # the only one that may say what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(error: Exception, code: int) -> int:
    """Say what is wrong. Functions, which messages of the library begin with, are nothing that was typed here."""
    print(f"keeplora: {re.sub(_FUNCTION, '', str(error))}", file=sys.stderr)
    return code


_FUNCTION = r"^(?:[a-z]+(?:_[a-z]+)+|comparison|create|init|load|look|plan|report|save|write): "


def _demo(parsed: argparse.Namespace) -> int:
    return _run_config("demo", parsed, seeds=tuple(range(parsed.seeds)) if parsed.seeds is not None else None)


def _run(parsed: argparse.Namespace) -> int:
    return _run_config(parsed.config, parsed, seeds=None)


def _init(parsed: argparse.Namespace) -> int:
    import torch

    from keeplora.tasks.own.draft import init

    on_gpu = torch.cuda.is_available()
    summary = init(
        parsed.folder,
        parsed.out,
        model=parsed.model,
        force=parsed.force,
        device="cuda" if on_gpu else "cpu",
        threads=min(4, os.cpu_count() or 1),
    )
    print(summary)
    return 0


def _run_config(config_name: str, parsed: argparse.Namespace, *, seeds: tuple[int, ...] | None) -> int:
    from keeplora.compare.dry_run import announce_dry_run, dry_run
    from keeplora.compare.runs import all_methods, is_finished, run_benchmark, with_all_methods
    from keeplora.report import report_run  # importing torch takes seconds: --help need not wait for it
    from keeplora.report.info import check_machine
    from keeplora.train.config import load_config, override, with_data
    from keeplora.train.export import check_exportable, export_runs
    from keeplora.train.plugins import join_plugins
    from keeplora.train.workload import configured_workload, notes

    shared, every = load_config(config_name), parsed.methods == ["all"]
    config = override(
        shared,
        plugins=join_plugins(shared.plugins, parsed.plugins),
        out=parsed.out,
        seeds=seeds,
        workers=parsed.workers,
        methods=None if parsed.methods is None or every else tuple(parsed.methods),
        keep_states=True if parsed.export else None,
        reuse_evaluations=False if parsed.evaluate_anew else None,
        own=with_data(shared.own, parsed.data),
        device=parsed.device,
    )
    check_machine(config)
    if not parsed.dry_run and not parsed.export and is_finished(whole := all_methods(config) if every else config):
        print(report_run(whole, run_benchmark(whole, accept_versions=parsed.accept_versions)))
        return 0
    workload = configured_workload(config, "cpu" if config.workers else config.device)
    print(*notes(workload), sep="\n", end="", file=sys.stderr)
    if every:
        config, left_out = with_all_methods(config, workload)
        print(*(f"left out: {name} ({why})" for name, why in left_out.items()), sep="\n", file=sys.stderr)
    if parsed.export:
        check_exportable(config, workload)
    if parsed.dry_run:
        print(announce_dry_run(config, workload, dry_run(config, workload)))
        return 0
    records = run_benchmark(config, workload=workload, accept_versions=parsed.accept_versions)
    print(report_run(config, records))
    if parsed.export:
        print(*export_runs(config, workload), sep="\n")
    return 0


def _compare(parsed: argparse.Namespace) -> int:
    from keeplora.compare.comparison import RATES, comparison
    from keeplora.compare.estimate import announcement
    from keeplora.compare.runs import run_benchmark
    from keeplora.report.comparison import report_comparison
    from keeplora.report.fronts_table import report_fronts
    from keeplora.report.info import check_machine
    from keeplora.train.config import override

    fronts = None if parsed.fronts is None else parsed.fronts or RATES
    chosen = comparison(
        parsed.benchmark,
        budget=parsed.budget,
        methods=parsed.methods,
        seeds=parsed.seeds,
        out=parsed.out,
        workers=parsed.workers,
        plugins=parsed.plugins,
        fronts=fronts,
        reference=parsed.reference,
    )
    if parsed.evaluate_anew:
        chosen = replace(chosen, config=override(chosen.config, reuse_evaluations=False))
    check_machine(chosen.config)
    print(announcement(chosen.config, chosen.workload), *chosen.notes(), sep="\n", file=sys.stderr)
    records = run_benchmark(chosen.config, workload=chosen.workload, accept_versions=parsed.accept_versions)
    if fronts is None:
        print(report_comparison(chosen.config, records, chosen.notes()))
    else:
        print(report_fronts(chosen.config, chosen.fronts, records, chosen.notes(), reference=parsed.reference))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from keeplora.report.page import write_page

    file, damaged = write_page(parsed.runs, parsed.out)
    print(f"report: {file}")
    for told in damaged:
        print(f"keeplora: not in the report: {told}", file=sys.stderr)
    return 1 if damaged else 0


def _plan(parsed: argparse.Namespace) -> int:
    import json
    import logging

    from keeplora.plan import Setting, plan

    logging.getLogger("transformers").setLevel(logging.ERROR)
    setting = Setting(
        rank=parsed.rank,
        method=parsed.method,
        weight_bytes={"bfloat16": 2, "float16": 2, "float32": 4}[parsed.dtype],
        bits=parsed.bits,
        merge=not parsed.no_merge,
        batch=parsed.batch,
        length=parsed.length,
        gpus=parsed.gpus or (1 if parsed.bits or parsed.no_merge else 8),
        budget=None if parsed.budget is None else parsed.budget * 10**9,
    )
    found = plan(
        parsed.model,
        setting,
        targets=parsed.targets[0] if parsed.targets == ["all-linear"] else parsed.targets,
        cards=parsed.card,
        gpu=parsed.gpu,
        batches=parsed.batches,
        weight_share=parsed.weight_share,
        checkpointing=parsed.checkpointing,
    )
    print(json.dumps(found.to_dict(), indent=1) if parsed.json else found)
    return 0


def _info(parsed: argparse.Namespace) -> int:
    from keeplora.report.info import describe

    print(describe())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keeplora",
        description="Teach a vision-language model one task after another and measure what it keeps.",
        epilog=_EXAMPLES,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"keeplora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="run the embedded benchmark and draw the comparison",
        description="A small CLIP learns seven image tasks with five methods, offline, on the CPU. "
        "Writes summary.json, metrics.csv and charts, and prints the table.",
        epilog="example:\n  keeplora demo --methods lora keeplora++ --seeds 1 --out runs/look",
        formatter_class=Help,
    )
    run_arguments(demo, default_out="runs/demo")
    demo.add_argument("--seeds", type=positive, metavar="N", help="number of seeds, 0 to N-1 (default: 3)")
    demo.set_defaults(command=_demo, dry_run=False, export=False, data=None, device=None)

    run = commands.add_parser(
        "run",
        help="run a configuration: a benchmark, or your own tasks",
        description="Run every method and seed of a configuration, or continue, and report like the demo. The file "
        "names a benchmark, or your own tasks: folders of images, data sets, LLaVA-style JSON (docs/own-tasks.md).",
        epilog="examples:\n  keeplora run tasks.toml --dry-run\n  keeplora run tasks.toml --out runs/mine --export",
        formatter_class=Help,
    )
    run.add_argument("config", metavar="CONFIG", help="a TOML or YAML file, or a shipped one: demo, mtil-1, ucit, …")
    run_arguments(run, default_out="as in CONFIG")
    run.add_argument(
        "--dry-run", action="store_true", help="check data and settings, estimate time and memory, train nothing"
    )
    run.add_argument("--device", choices=["cpu", "cuda"], help="where to run (default: as in CONFIG)")
    run.add_argument("--data", metavar="FOLDER", help="where the data of a benchmark is (root in [data])")
    run.add_argument(
        "--export",
        action="store_true",
        help="write the merged model and the PEFT adapter into every run's folder",
    )
    run.set_defaults(command=_run)

    init = commands.add_parser(
        "init",
        help="look at a folder of your data and write a settings file for it",
        description="Find class folders of images, LLaVA-style JSON and files that `datasets` reads. Count samples, "
        "check image headers, and write a commented settings file for keeplora run. The data is not changed.",
        epilog="examples:\n  keeplora init data\n  keeplora init data --out birds.toml --model ViT-L-14/openai\n"
        "  keeplora init questions --model transformers:llava-hf/llava-1.5-7b-hf",
        formatter_class=Help,
    )
    init.add_argument("folder", metavar="FOLDER", help="class/*.jpg, train/class/*.jpg, task/class/*.jpg, *.json, …")
    init.add_argument("--out", metavar="FILE", default="tasks.toml", help="the settings file (default: tasks.toml)")
    init.add_argument(
        "--model", metavar="NAME", default="", help="ViT-B-16/openai, hf-hub:… or transformers:… (default: by the data)"
    )
    init.add_argument("--force", action="store_true", help="replace FILE if it exists")
    init.set_defaults(command=_init)

    compare = commands.add_parser(
        "compare",
        help="compare all methods, each at its own settings",
        description="Estimate the time, run every method and seed, or continue, and write the table (table.md, "
        "summary.json, metrics.csv) and charts.",
        epilog="examples:\n  keeplora compare --methods all --seeds 3\n  keeplora compare --budget small\n"
        "  keeplora compare --fronts --benchmark minilm --seeds 3\n"
        "  keeplora compare --methods ablations --benchmark minilm\n  keeplora compare --methods lora inflora keeplora",
        formatter_class=Help,
    )
    run_arguments(compare, default_out="runs/compare-BENCHMARK-BUDGET", methods="all")
    compare.add_argument(
        "--seeds", type=positive, metavar="N", help="number of seeds, 0 to N-1 (default: the budget's)"
    )
    compare.add_argument(
        "--budget", default="full", metavar="small|full", help="small: about 10 minutes on 2 cores (default: full)"
    )
    compare.add_argument(
        "--benchmark",
        default="embedded",
        metavar="NAME",
        help="embedded (default), minilm, clip-b16, or a file like theirs",
    )
    compare.add_argument(
        "--fronts",
        nargs="*",
        type=float,
        metavar="FACTOR",
        help="run every method at these multiples of its learning rate (default: 0.3 1 3), choose on validation data, "
        "plot Transfer against Last, and test the methods on the same items",
    )
    compare.add_argument(
        "--reference", default="", metavar="NAME", help="with --fronts: the method the others are tested against"
    )
    compare.set_defaults(command=_compare)

    report = commands.add_parser(
        "report",
        help="write one HTML file about finished or unfinished runs",
        description="Write tables, charts, settings and environment of run folders into one file that needs no "
        "network. Several folders stand side by side. A run that is still going on is not disturbed.",
        epilog="examples:\n  keeplora report runs/demo\n  keeplora report runs/mine runs/theirs --out compared.html",
        formatter_class=Help,
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders of keeplora run, demo or compare (their --out)")
    report.add_argument(
        "--out", metavar="FILE.html", help="the file (default: report.html in RUN, or here for several)"
    )
    report.set_defaults(command=_report)

    plan = commands.add_parser(
        "plan",
        help="predict memory and time of a model, without its weights",
        description="Predict bytes and seconds of every phase of a task from a transformers config, without weights. "
        "Say which cards the model fits and with which batch, beside PEFT's LoRA. Nothing is measured.",
        epilog="examples:\n  keeplora plan llava-1.5-7b\n  keeplora plan qwen2.5-vl-72b --gpus 8 --card 80\n"
        "  keeplora plan ./my-model --rank 64 --batch 4 --length 2048 --json",
        formatter_class=Help,
    )
    plan_arguments(plan)
    plan.set_defaults(command=_plan)

    info = commands.add_parser(
        "info",
        help="show versions, compiled kernels, methods and benchmarks",
        description="Show versions, compiled kernels, methods and benchmarks.",
    )
    info.set_defaults(command=_info)
    return parser

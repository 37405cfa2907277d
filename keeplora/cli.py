"""The command line: arguments to calls, no logic."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from keeplora._arguments import positive, run_arguments
from keeplora._version import __version__

_EXAMPLES = """examples:
  keeplora demo                                   the embedded benchmark, all methods, three seeds
  keeplora demo --methods lora keeplora++ --seeds 1
  keeplora run quick                              a shipped configuration
  keeplora init data                              your own data: look at it, write tasks.toml for keeplora run
  keeplora run tasks.toml --dry-run               your own tasks: checks data, tells time and memory
  keeplora run tasks.toml --export                learns them; leaves models and adapters for others
  keeplora compare --budget small                 every method in ten minutes; --budget full for the whole table
  keeplora compare --methods lora mine --plugins my_methods    a method of your own: my_methods.py registers it
  keeplora report runs/demo                       one HTML file about a run; of several runs, side by side
  keeplora plan llava-1.5-7b                      does a model fit? bytes and seconds by phase, without its weights
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
    print(f"keeplora: {error}", file=sys.stderr)
    return code


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
    from keeplora.compare.runs import run_benchmark, with_all_methods
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
        batch=parsed.batch,
        length=parsed.length,
        gpus=parsed.gpus,
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keeplora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="run the embedded benchmark and draw the comparison",
        description="A real (small) CLIP learns seven image tasks with every method, offline, on the CPU. "
        "Writes summary.json, metrics.csv and charts, and prints the table.",
        epilog="example:\n  keeplora demo --methods lora keeplora++ --seeds 1 --out runs/look",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run_arguments(demo, default_out="runs/demo")
    demo.add_argument("--seeds", type=positive, metavar="N", help="number of seeds, 0 to N-1 (default: 3)")
    demo.set_defaults(command=_demo, dry_run=False, export=False, data=None, device=None)

    run = commands.add_parser(
        "run",
        help="run a configuration: a benchmark, or your own tasks",
        description="Run every method and seed of a configuration and report like the demo. The file names a "
        "benchmark, or your own tasks: folders of images, data sets, LLaVA-style JSON (docs/own-tasks.md).",
        epilog="examples:\n  keeplora run tasks.toml --dry-run\n  keeplora run tasks.toml --out runs/mine --export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("config", metavar="CONFIG", help="a TOML or YAML file, or a shipped one: demo, mtil-1, ucit, …")
    run_arguments(run, default_out="as in CONFIG")
    run.add_argument(
        "--dry-run", action="store_true", help="check data and settings, tell time and memory, and train nothing"
    )
    run.add_argument("--device", choices=["cpu", "cuda"], help="instead of what CONFIG says")
    run.add_argument("--data", metavar="FOLDER", help="where the data of a benchmark of the field is (root of [data])")
    run.add_argument(
        "--export",
        action="store_true",
        help="write the merged model and the PEFT adapter of every run below its folder",
    )
    run.set_defaults(command=_run)

    init = commands.add_parser(
        "init",
        help="look at a folder of your data and write a settings file for it",
        description="Recognises class folders of images, JSON in LLaVA's form and what `datasets` reads, counts, opens "
        "image headers, and writes a commented settings file for keeplora run. The data is left as it is.",
        epilog="examples:\n  keeplora init data\n  keeplora init data --out birds.toml --model ViT-L-14/openai\n"
        "  keeplora init questions --model transformers:llava-hf/llava-1.5-7b-hf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init.add_argument("folder", metavar="FOLDER", help="class/*.jpg, train/class/*.jpg, task/class/*.jpg, *.json, …")
    init.add_argument("--out", metavar="FILE", default="tasks.toml", help="what to write (default: tasks.toml)")
    init.add_argument("--model", metavar="NAME", default="", help="ViT-B-16/openai, hf-hub:…, or transformers:…")
    init.add_argument("--force", action="store_true", help="write FILE anew where it is there")
    init.set_defaults(command=_init)

    compare = commands.add_parser(
        "compare",
        help="compare all methods, each with settings of its own",
        description="Runs every method and seed, or continues, and writes the table (table.md, summary.json, "
        "metrics.csv) and charts. Prints an estimate of the time first.",
        epilog="examples:\n  keeplora compare --methods all --seeds 3\n  keeplora compare --budget small\n"
        "  keeplora compare --fronts --benchmark minilm --seeds 3\n"
        "  keeplora compare --methods ablations --benchmark minilm\n  keeplora compare --methods lora inflora keeplora",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run_arguments(compare, default_out="runs/compare-BENCHMARK-BUDGET", methods="all")
    compare.add_argument(
        "--seeds", type=positive, metavar="N", help="number of seeds, 0 to N-1 (default: the budget's)"
    )
    compare.add_argument("--budget", default="full", metavar="small|full", help="small: 10 minutes on 2 cores")
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
        "draw Transfer against Last, and test the methods on the same items",
    )
    compare.add_argument(
        "--reference", default="", metavar="NAME", help="with --fronts: the method the others are tested against"
    )
    compare.set_defaults(command=_compare)

    report = commands.add_parser(
        "report",
        help="write one HTML file about finished or unfinished runs",
        description="Tables, charts, settings and environment of run folders in one file that needs no network. "
        "Several folders stand side by side. Folders of runs that are still going on are only read.",
        epilog="examples:\n  keeplora report runs/demo\n  keeplora report runs/mine runs/theirs --out compared.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders of keeplora run, demo or compare (their --out)")
    report.add_argument(
        "--out", metavar="FILE.html", help="the file (default: report.html in RUN, or here for several)"
    )
    report.set_defaults(command=_report)

    plan = commands.add_parser(
        "plan",
        help="predict memory and time of a model, without its weights",
        description="Bytes and seconds of every phase of a task, from a transformers config on the meta device: which "
        "cards the model fits, with which batch, beside PEFT's LoRA. Predicted, not measured.",
        epilog="examples:\n  keeplora plan llava-1.5-7b\n  keeplora plan qwen2.5-vl-72b --gpus 8 --card 80\n"
        "  keeplora plan ./my-model --rank 64 --batch 4 --length 2048 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument(
        "model", metavar="MODEL", help="a shipped config (llava-1.5-7b, …), config.json, folder or model id"
    )
    plan.add_argument("--rank", type=positive, default=16, metavar="R", help="of the adapters (default: 16)")
    plan.add_argument("--targets", nargs="+", default=["all-linear"], metavar="NAME", help="target_modules")
    plan.add_argument("--method", default="keeplora++", metavar="NAME", help="keeplora, keeplora++ or lora")
    plan.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the weights")
    plan.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="sequences of a step on a GPU (default: 1)"
    )
    plan.add_argument("--length", type=positive, default=1024, metavar="N", help="tokens of a sequence (default: 1024)")
    plan.add_argument("--gpus", type=positive, default=8, metavar="N", help="beside one card: so many (default: 8)")
    plan.add_argument("--card", type=positive, nargs="+", default=[24, 48, 80], metavar="GB", help="sizes of cards")
    plan.add_argument("--gpu", default="H100", metavar="NAME", help="whose rates: H200, H100 (default), A100, 4090")
    plan.add_argument("--budget", type=positive, metavar="GB", help="memory_budget of the settings (default: exact)")
    plan.add_argument("--batches", type=positive, default=100, metavar="N", help="of a pass (default: 100)")
    plan.add_argument(
        "--weight-share", type=float, nargs="+", metavar="X", help="k / width of weights' bases (default: 0.13 0.30)"
    )
    plan.add_argument("--checkpointing", action="store_true", help="activations with gradient checkpointing")
    plan.add_argument("--json", action="store_true", help="everything as JSON")
    plan.set_defaults(command=_plan)

    info = commands.add_parser(
        "info", help="show versions, compiled kernels, methods and benchmarks", description="What is installed here."
    )
    info.set_defaults(command=_info)
    return parser

"""The command line: ``fxmerge compress | frontier | fold | export | inspect | doctor | store``.

Exit codes: 0, 1 with one line on stderr that says what is wrong, 2 for wrong usage. An exception of the user's own code
is theirs, with its traceback. What takes time to import is imported where it is used, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import sys
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import FxmergeError, StoreError, UserError

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from .driver import Frontier
    from .inputs import Example
    from .plan import Plan
    from .result import Result
    from .runtimes import Runtime, Signature
    from .store import Environment

__all__ = ["main"]

_COLUMNS = 120

_MODELS = """\
MODEL is one of
  package.module:name  a torch.nn.Module, or a function or class that returns one; the current folder is searched too
  FILE.pt2             a program of torch.export
  FOLDER               what 'compress --output FOLDER' wrote; it brings its own example input
"""
_EXAMPLES = """\
examples:
  fxmerge inspect  nets:resnet --input-shape 1x3x224x224
  fxmerge compress nets:resnet --input-shape 1x3x224x224 --budget 60% --calibration data:images --output small
  fxmerge frontier nets:resnet --input-shape 1x3x224x224 --runtime macs
  fxmerge export   small small.onnx
  fxmerge fold     net.pt2 --input-shape 1x3x224x224 --export folded.onnx
  fxmerge doctor
"""
_STORE_EXAMPLES = """\
examples:
  fxmerge store list
  fxmerge store show  --environment 3fa2c1d8 --layers
  fxmerge store prune --older-than 30d --runtime onnxruntime --dry-run
  fxmerge store merge other/latency.sqlite
"""
_AGES = {"h": "hours", "d": "days", "w": "weeks"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        0, or 1 after an error of fxmerge's.

    Raises:
        SystemExit: wrong usage (2), ``--help`` and ``--version`` (0).
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help()
        return 0
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        arguments.run(arguments)
    except FxmergeError as error:
        print(f"fxmerge: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


# --- arguments --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxmerge",
        description="Make a PyTorch CNN shallower until it meets a latency budget.",
        epilog=f"{_MODELS}\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fxmerge {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(
        name: str, run: Any, text: str, example: str, *options: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"{_MODELS}\nexample:\n  fxmerge {name} {example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[_model_options(), *options],
        )
        added.set_defaults(run=run, parser=added)
        return added

    compress = command(
        "compress",
        _compress,
        "make a network meet a latency budget; prints the report",
        "nets:resnet --input-shape 1x3x224x224 --budget 60% --calibration data:images --output small",
        _search_options(),
        _measure_options(),
    )
    compress.add_argument(
        "--budget", required=True, help="a share of the original (0.6, 60%%) or an amount (8ms, 1.2GMACs)"
    )
    compress.add_argument("--levels", type=int, help="choose by the paper's Algorithm 1 with so many latency levels")
    compress.add_argument("--output", metavar="FOLDER", help="save the result: it trains, merges and exports later")
    _add_export(compress, "the merged network")

    frontier = command(
        "frontier",
        _frontier,
        "list all Pareto-optimal plans: latency, share of the original, loss, convolutions",
        "nets:resnet --input-shape 1x3x224x224 --runtime macs --save plans.json\n"
        "  fxmerge frontier nets:resnet --input-shape 1x3x224x224 --evaluate data:accuracy --plot frontier.html",
        _search_options(),
        _measure_options(),
    )
    frontier.add_argument(
        "--budget", action="append", default=[], help="only the plan for this budget; may be repeated"
    )
    frontier.add_argument("--save", metavar="FILE", help="write the listed plans as JSON, for fxmerge.Plan.from_json")
    _add_evaluation(frontier)

    fold = command(
        "fold",
        _fold,
        "fold what is already linear, exactly: nothing is lost",
        "nets:resnet --input-shape 1x3x224x224 --export folded.onnx",
    )
    _add_export(fold, "the folded network")

    export = command(
        "export",
        _export,
        "write a network to .onnx, .pt2 or .engine and check what was written",
        "small small.onnx small.pt2\n"
        "  fxmerge export small small.engine --precision fp16 --compute-capability 8.9 --batches 1,8,32",
    )
    export.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files to write; a saved result is merged first; X.engine comes with X.onnx and X.engine.json",
    )
    export.add_argument("--fixed-batch", action="store_true", help="the file takes the example's batch size only")
    export.add_argument("--no-check", action="store_true", help="do not run what was written")
    _add_engine(export)

    command(
        "inspect",
        _inspect,
        "print the region tree, what could become of every convolution, and why the rest could not",
        "nets:resnet --input-shape 1x3x224x224",
        _search_options(),
    )

    doctor = commands.add_parser(
        "doctor",
        help="say which runtimes and file formats work on this machine, with a proof for each",
        description="Build, run and compress a small network with every runtime, and export it to every file format. "
        "What is missing is said with how to install it. Ends with 1 if the default runtime does not work.",
    )
    doctor.add_argument("--json", metavar="FILE", help="write the record as JSON, too")
    doctor.set_defaults(run=_doctor)
    _add_store(commands)
    return parser


def _add_store(commands: Any) -> None:
    text = "list, show, remove and merge the latencies that have been measured"
    store = commands.add_parser(
        "store",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_STORE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    store.set_defaults(run=lambda _: store.print_help())
    actions = store.add_subparsers(metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", metavar="FILE", help="another store than the one of this user")
    common.add_argument("--json", action="store_true", help="print JSON instead of text")

    def action(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = actions.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[common]
        )
        added.set_defaults(run=run, parser=added)
        return added

    action("list", _store_list, "list the environments that latencies were measured in")
    show = action("show", _store_show, "print all about the environments, and their layers")
    show.add_argument("--layers", action="store_true", help="list every layer with its latency")
    prune = action("prune", _store_prune, "remove the latencies that all the given options apply to")
    for each in (show, prune):
        each.add_argument("--environment", metavar="ID", help="one environment, by its id in 'store list'")
    prune.add_argument("--runtime", metavar="NAME", help="such as onnxruntime, or 'onnxruntime 1.32.0'")
    prune.add_argument("--device", metavar="NAME", help="part of the device's name")
    prune.add_argument("--older-than", type=_age, metavar="AGE", help="such as 12h, 30d or 8w")
    prune.add_argument("--all", action="store_true", help="remove everything; goes with none of the above")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    merge = action("merge", _store_merge, "add the latencies of another store; of two of one layer the newer stays")
    merge.add_argument("other", metavar="OTHER", help="its file, which stays as it is")


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("model", metavar="MODEL", help="the network, see below")
    options.add_argument("--weights", metavar="FILE", help="safetensors file with the network's state_dict")
    options.add_argument("--seed", type=int, default=0, help="for random weights and inputs (default 0)")
    example = options.add_mutually_exclusive_group()
    example.add_argument(
        "--input-shape",
        action="append",
        type=_shape,
        metavar="SHAPE",
        help="example input such as 1x3x224x224, or 1x16:int64 (zeros); repeated for several inputs",
    )
    example.add_argument(
        "--input", metavar="NAME", help="package.module:function that returns the example: a tensor, tuple or dict"
    )
    options.add_argument("--json", action="store_true", help="print JSON instead of text")
    return options


def _search_options() -> argparse.ArgumentParser:
    """Options that are handed on only where they are given, so that the defaults are the library's."""
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument("--method", help="layermerge (default), or a baseline of the paper: depth, layer")
    options.add_argument("--max-kernel", type=int, metavar="K", help="largest kernel to merge into (default 7)")
    options.add_argument(
        "--max-span", type=int, metavar="N", help="most convolutions in one merged segment (default 16)"
    )
    options.add_argument(
        "--include", action="append", metavar="PATH", help="change nothing outside of this submodule; may be repeated"
    )
    options.add_argument(
        "--exclude", action="append", metavar="PATH", help="change nothing inside of this submodule; may be repeated"
    )
    options.add_argument(
        "--exit-activation", action="store_true", help="allow an activation behind a merge whose exit has none"
    )
    return options


def _measure_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--runtime",
        default="auto",
        help="auto (default), or a name that 'fxmerge doctor' lists, as in torch or tensorrt:fp16",
    )
    options.add_argument(
        "--threads", type=_positive, metavar="N", help="threads of onnxruntime (default: one per core)"
    )
    options.add_argument(
        "--calibration", metavar="NAME", help="package.module:function that returns an iterable of input batches"
    )
    options.add_argument(
        "--inputs", metavar="NAME", help="package.module:function that takes the model's inputs out of a batch"
    )
    options.add_argument(
        "--importance",
        default="auto",
        help="distortion (default with calibration), local, or magnitude (default without)",
    )
    options.add_argument(
        "--importance-table", metavar="FILE", help="keep every loss at once; the next run scores only what is missing"
    )
    options.add_argument(
        "--workers", type=_positive, metavar="N", help="processes that score candidates (default: this one)"
    )
    options.add_argument("--fit", default="auto", help="refit (default with calibration) or compose (default without)")
    options.add_argument(
        "--refit-kept", action="store_true", help="with refit, also fit convolutions that do not merge"
    )
    options.add_argument(
        "--search",
        type=_effort,
        default="1min",
        metavar="TIME",
        help="compare plans near the best by their networks' outputs: 30s, 1min (default), a number of networks, or none",
    )
    options.add_argument(
        "--polish",
        type=_effort,
        metavar="TIME",
        help="train the result towards the original's values, no labels: 10s, or a number of steps (default: none)",
    )
    return options


def _effort(text: str) -> int | str | None:
    return None if text == "none" else int(text) if text.isdecimal() else text


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group(
        "with a metric", "compress for every budget (default: 80, 65, 50, 40, 30 %) and evaluate the merged network"
    )
    options.add_argument(
        "--evaluate", metavar="NAME", help="package.module:function from a network in eval mode to a number"
    )
    options.add_argument(
        "--output", metavar="FILE", help="write JSON after every budget; a second call continues what is there"
    )
    options.add_argument(
        "--plot", action="append", default=[], metavar="FILE", help="draw a .png or .html; may be repeated"
    )
    options.add_argument(
        "--save-results", metavar="FOLDER", help="save the result of every budget in a folder of its own"
    )
    options.add_argument("--markdown", action="store_true", help="print the table in Markdown")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """Options that are handed on only where they are given, see :func:`_engine`."""
    options = parser.add_argument_group("options for .engine", argument_default=argparse.SUPPRESS)
    options.add_argument(
        "--runtime", help="tensorrt (default where it is installed, with a CUDA device) or tensorrt-rtx, on any machine"
    )
    options.add_argument("--precision", help="fp32, fp16 or bf16 (default: the network's own)")
    options.add_argument("--workspace", metavar="SIZE", help="most memory for temporary buffers, such as 2GiB")
    options.add_argument(
        "--batches", type=_sizes, metavar="N,N,N", help="smallest, usual, largest batch (default: the example's only)"
    )
    options.add_argument(
        "--compute-capability", metavar="X.Y", help="GPU to build for; tensorrt-rtx only (default: all from 8.0 on)"
    )


def _add_export(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="PATH",
        help=f"write {what} to .onnx, .pt2 or .engine; may be repeated",
    )


def _positive(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _age(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age; expected something like 12h, 30d or 8w")
    return timedelta(**{_AGES[match.group(2)]: int(match.group(1))})


def _sizes(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} are no batch sizes; expected something like 1,8,32")
    return tuple(map(int, text.split(",")))


def _shape(text: str) -> tuple[tuple[int, ...], str | None]:
    match = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected something like 1x3x224x224 or 1x16:int64")
    return tuple(map(int, match.group(1).split("x"))), match.group(2)


# --- commands ---------------------------------------------------------------------------------------------------------


def _compress(args: argparse.Namespace) -> None:
    from .driver import compress
    from .save import export

    _check_paths(args.export)
    if args.output is not None:
        _check_folder(Path(args.output).resolve())
    runtime = _runtime(args)
    source, example = _source(args)
    options = {**_searching(args), **_measuring(args), "runtime": runtime, "levels": args.levels}
    with _workers(args) as executor:
        result = compress(_module(source), example, args.budget, executor=executor, **options)
    if args.output is not None:
        result.save(args.output)
    _show(args, str(result.report), {"plan": _plan_data(result.plan), "report": result.report.to_json()})
    for path in args.export:
        export(result, path)


def _frontier(args: argparse.Namespace) -> None:
    from .budget import parse_budget
    from .plan import format_latency
    from .runtimes import get_runtime

    if args.evaluate is not None:
        if args.save is not None:
            args.parser.error("--save is for plans by prediction; with --evaluate say --save-results")
        _evaluate(args)
        return
    for option in ("output", "plot", "save_results", "markdown"):
        if getattr(args, option):
            args.parser.error(f"--{option.replace('_', '-')} goes with --evaluate")
    if args.save is not None:
        _check_file(Path(args.save))
    runtime = get_runtime(_runtime(args))
    for budget in args.budget:
        parse_budget(budget, runtime.unit)
    found = _made(args, runtime)
    plans = [found.at(budget) for budget in args.budget] or [found.plan(index) for index in range(len(found))]
    if args.save is not None:
        Path(args.save).write_text(
            json.dumps({"plans": [_plan_data(plan) for plan in plans]}, indent=1), encoding="utf-8"
        )
    convolutions = found.convolutions
    rows = [
        {
            "latency": plan.predicted,
            "share": plan.predicted / found.original,
            "loss": plan.loss,
            "convolutions": convolutions - _fewer(plan),
        }
        for plan in plans
    ]
    lines = [f"original: {format_latency(found.original, found.unit)}, {convolutions} convolutions", ""]
    lines.append(f"{'latency':>14}  {'share':>7}  {'loss':>10}  {'convolutions':>12}")
    for row in rows:
        latency = format_latency(row["latency"], found.unit)
        lines.append(f"{latency:>14}  {row['share']:>7.1%}  {row['loss']:>10.4g}  {row['convolutions']:>12}")
    _show(args, "\n".join(lines), {"unit": found.unit, "original": found.original, "plans": rows})


def _made(args: argparse.Namespace, runtime: Runtime) -> Frontier:
    """The frontier that the arguments describe."""
    from .driver import frontier

    source, example = _source(args)
    options = {**_searching(args), **_measuring(args), "runtime": runtime}
    with _workers(args) as executor:
        return frontier(_module(source), example, executor=executor, **options)


def _evaluate(args: argparse.Namespace) -> None:
    """The frontier with a metric on it; a row is printed as soon as it is known."""
    from .plotting import check_plot, plot
    from .quality import BUDGETS, Quality, check_evaluation, metric_name
    from .runtimes import get_runtime

    for path in args.plot:
        check_plot(path)
    metric = _named(args.evaluate)
    runtime = get_runtime(_runtime(args))
    budgets = args.budget or BUDGETS
    known = {"metric": metric_name(metric), "runtime": {**runtime.environment(), "name": runtime.name}}
    check_evaluation(budgets, runtime.unit, args.output, args.save_results, known)
    found = _made(args, runtime)
    started = False

    def show(quality: Quality) -> None:
        nonlocal started
        if not (args.json or args.markdown):
            _print("\n".join(quality.lines()[-1 if started else 0 :]))
        started = True

    quality = found.evaluate(metric, budgets, save=args.output, save_results=args.save_results, on_row=show)
    if args.json or args.markdown:
        _show(args, quality.markdown(), quality.to_json())
    for path in args.plot:
        plot(quality, path)


def _fold(args: argparse.Namespace) -> None:
    from .capture import capture
    from .driver import fold
    from .graph import graph_meta
    from .report import size_of
    from .result import Result
    from .save import export

    _check_paths(args.export)
    source, example = _source(args)
    if isinstance(source, Result):
        before, folded = source.model, source.merge()
    else:
        before, folded = capture(source, example), fold(source, example)
    sizes = {
        name: {
            "operations": _operations(gm),
            "convolutions": size_of(gm).convolutions,
            "parameters": size_of(gm).parameters,
        }
        for name, gm in (("before", before), ("after", folded))
    }
    refusals = graph_meta(folded).get("refusals", [])
    lines = [f"{name + ':':<14}{count:,} -> {sizes['after'][name]:,}" for name, count in sizes["before"].items()]
    lines += [line for each in refusals for line in _wrap(f"left {each['first']} [{each['code']}]: {each['reason']}")]
    _show(args, "\n".join(lines), {**sizes, "refusals": refusals})
    for path in args.export:
        export(folded, path, example)


def _export(args: argparse.Namespace) -> None:
    from .result import Result
    from .save import export

    options = _engine(args)
    _check_paths(args.paths, options)
    source, example = _source(args)
    network = source if isinstance(source, Result) else source.eval()
    for path in args.paths:
        more = options if path.endswith(".engine") else {}
        export(network, path, example, dynamic_batch=not args.fixed_batch, check=not args.no_check, **more)
    _show(args, "\n".join(args.paths), {"exported": args.paths})


def _inspect(args: argparse.Namespace) -> None:
    from .candidates import Limits, submodules
    from .capture import capture
    from .inspection import inspection_json, inspection_text
    from .passes.enumerate_segments import enumerate_segments

    searching = _searching(args)
    Limits(**{**searching, "include": (), "exclude": ()})  # refuses before the network is captured
    source, example = _source(args)
    for option in ("include", "exclude"):
        searching[option] = submodules(_module(source), option, searching.get(option, ()))
    limits = Limits(**searching)
    gm = capture(_module(source), example)
    enumeration = enumerate_segments(gm, limits)
    _show(args, inspection_text(gm, enumeration), inspection_json(gm, enumeration))


def _doctor(args: argparse.Namespace) -> None:
    from .doctor import examine

    if args.json is not None:
        _check_file(Path(args.json))
    found = examine()
    _print(str(found))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    if not found.healthy:
        raise UserError(f"the default runtime does not work here: {found.default.name}")


def _store_list(args: argparse.Namespace) -> None:
    from .store import LatencyStore

    with LatencyStore(_store_path(args), readonly=True) as store:
        found = store.environments()
    size = store.path.stat().st_size
    lines = [f"{store.path}: {_counted(found)}, {size / 1000:,.0f} kB"]
    if found:
        lines += ["", *_environment_table(found)]
    data = [_environment_data(each) for each in found]
    _show(args, "\n".join(lines), {"path": str(store.path), "bytes": size, "environments": data})


def _store_show(args: argparse.Namespace) -> None:
    from .plan import format_latency
    from .store import LatencyStore

    lines, data = [], []
    with LatencyStore(_store_path(args), readonly=True) as store:
        found = [each for each in store.environments() if args.environment in (None, each.id)]
        if args.environment is not None and not found:
            raise UserError(f"{store.path} holds no environment {args.environment!r}")
        for each in found:
            lines += [f"{each.id}: {_dated(each)}", *(f"  {key:<10} {each.values[key]}" for key in sorted(each.values))]
            data.append(_environment_data(each))
            if args.layers:
                entries = list(store.entries(each.id))
                data[-1]["layers"] = [
                    {**json.loads(entry.signature.key()), "latency": entry.latency, "unit": entry.unit}
                    for entry in entries
                ]
                lines += [
                    f"  {format_latency(entry.latency, entry.unit):>12}  {_layer(entry.signature)}" for entry in entries
                ]
            lines.append("")
    _show(args, "\n".join(lines[:-1]), {"path": str(store.path), "environments": data})


def _store_prune(args: argparse.Namespace) -> None:
    from .store import LatencyStore

    criteria = {name: getattr(args, name) for name in ("environment", "runtime", "device", "older_than")}
    if args.all == any(value is not None for value in criteria.values()):
        args.parser.error("say what to remove: --environment, --runtime, --device or --older-than; or --all, alone")
    with LatencyStore(_store_path(args), readonly=True):
        pass  # a store that is not there is not made, to remove nothing from it
    with LatencyStore(_store_path(args), readonly=args.dry_run) as store:
        found = store.prune(**criteria, everything=args.all, dry_run=args.dry_run)
    lines = [f"{store.path}: {'would remove' if args.dry_run else 'removed'} {_counted(found)}"]
    if found:
        lines += ["", *_environment_table(found)]
    _show(args, "\n".join(lines), {"removed": [_environment_data(each) for each in found], "dry_run": args.dry_run})


def _store_merge(args: argparse.Namespace) -> None:
    from .store import LatencyStore

    with LatencyStore(Path(args.other), readonly=True):
        pass  # before a store is made to merge into
    with LatencyStore(_store_path(args)) as store:
        added, replaced = store.merge(Path(args.other))
    _show(
        args,
        f"{store.path}: {added:,} latencies added, {replaced:,} replaced by newer ones",
        {"path": str(store.path), "added": added, "replaced": replaced},
    )


def _store_path(args: argparse.Namespace) -> Path:
    from .store import default_path

    return default_path() if args.store is None else Path(args.store)


def _environment_table(found: Sequence[Environment]) -> list[str]:
    names = ("runtime", "threads", "precision", "device")
    rows = [[f"{'id':<8}", "latencies", f"{'oldest':<10}", f"{'newest':<10}", *names]]
    for each in found:
        about = (each.values.get(name, "-") for name in names)
        rows.append([each.id, f"{each.entries:>9,}", each.oldest[:10], each.newest[:10], *about])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _environment_data(each: Environment) -> dict[str, Any]:
    names = ("id", "entries", "oldest", "newest", "values")
    return {name: getattr(each, name) for name in names}


def _counted(found: Sequence[Environment]) -> str:
    entries = sum(each.entries for each in found)
    return f"{_plural(entries, 'latency', 'latencies')} of {_plural(len(found), 'environment', 'environments')}"


def _dated(each: Environment) -> str:
    return f"{_plural(each.entries, 'latency', 'latencies')}, measured from {each.oldest} to {each.newest} (UTC)"


def _plural(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _layer(signature: Signature) -> str:
    """What a stored latency is about, in a line."""
    from .runtimes import LayerSignature

    if not isinstance(signature, LayerSignature):
        shapes = [f"shapes {' '.join('x'.join(map(str, shape)) for shape in signature.shapes)}"]
        return ", ".join([signature.operation, *(shapes if signature.shapes else []), f"batch {signature.batch}"])
    parts = [str(signature.geometry), f"input {'x'.join(map(str, signature.in_size))}", f"batch {signature.batch}"]
    parts += [signature.activation] if signature.activation is not None else []
    return ", ".join([*parts, "addition"] if signature.joined else parts)


# --- what commands share ----------------------------------------------------------------------------------------------


def _source(args: argparse.Namespace) -> tuple[nn.Module | Result, Example]:
    """The network that MODEL names, a Result if it is a folder, and the example input."""
    import torch

    from .result import Result, load

    folder = Path(args.model).is_dir()
    if not (folder or args.input or args.input_shape):
        args.parser.error("an example input is needed: --input-shape or --input")
    source: nn.Module | Result
    if folder:
        source = load(args.model)
    elif args.model.endswith(".pt2"):
        source = _read_program(args.model)
    else:
        source = _make_model(args.model, args.seed)
    torch.manual_seed(args.seed)
    if args.weights is not None:
        _load_weights(_module(source), args.weights)
    if args.input is not None:
        return source, _named(args.input)()
    if args.input_shape is not None:
        return source, tuple(_random(shape, dtype, _module(source)) for shape, dtype in args.input_shape)
    assert isinstance(source, Result)  # noqa: S101 - a module without an example was refused above
    positional, keywords = source.example
    return source, keywords or positional


def _module(source: nn.Module | Result) -> nn.Module:
    from .result import Result

    return source.model if isinstance(source, Result) else source


def _make_model(spec: str, seed: int) -> nn.Module:
    import torch
    from torch import nn

    if ":" not in spec:
        raise UserError(
            f"no model {spec!r}: expected package.module:name, a .pt2 file, or a folder that compress --output wrote"
        )
    found = _named(spec)
    torch.manual_seed(seed)  # only now: importing may draw numbers, once
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _read_program(path: str) -> nn.Module:
    """A ``.pt2`` file as a module; torch's own refuses ``train()`` and ``eval()``, its operators having fixed modes."""
    import torch

    if not zipfile.is_zipfile(path):  # torch would log its own traceback
        raise UserError(f"{path} is missing, or is no program that torch.export.save wrote")
    try:
        model: nn.Module = torch.export.load(path).module(check_guards=False)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a program of torch.export: {type(error).__name__}: {error}"
        ) from error
    del model.train, model.eval
    return model


def _named(spec: str) -> Any:
    """What ``package.module:name`` names."""
    path, _, name = spec.partition(":")
    if not (path and name):
        raise UserError(f"{spec!r} names nothing: expected package.module:name")
    try:
        found: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{spec}: there is no module {error.name!r}, neither installed nor in {os.getcwd()}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{spec}: {path} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{spec} is a {type(found).__name__}; expected something that can be called")
    return found


def _load_weights(model: nn.Module, path: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--weights {path}: {error}") from error


def _random(shape: tuple[int, ...], dtype: str | None, model: nn.Module) -> Tensor:
    import torch

    from .graph import dtype_of

    kind = dtype_of(model) if dtype is None else getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise UserError(f"--input-shape: torch has no dtype {dtype!r}; expected one such as float32 or int64")
    return torch.randn(shape).to(kind) if kind.is_floating_point else torch.zeros(shape, dtype=kind)


def _searching(args: argparse.Namespace) -> dict[str, Any]:
    names = ("method", "max_kernel", "max_span", "include", "exclude", "exit_activation")
    return {name: getattr(args, name) for name in names if name in args}


def _runtime(args: argparse.Namespace) -> str | Runtime:
    if args.threads is None:
        return str(args.runtime)
    if args.runtime not in ("auto", "onnxruntime"):
        args.parser.error("--threads goes with --runtime onnxruntime")
    from .runtimes.onnxruntime import OnnxRuntime

    return OnnxRuntime(args.threads)


def _measuring(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "calibration": None if args.calibration is None else _named(args.calibration)(),
        "inputs": None if args.inputs is None else _named(args.inputs),
        "importance": args.importance,
        "importance_table": args.importance_table,
        "fit": args.fit,
        "refit_kept": args.refit_kept,
        "search": args.search,
        "polish": args.polish,
    }


def _workers(args: argparse.Namespace) -> AbstractContextManager[Executor | None]:
    if args.workers is None:
        return nullcontext()
    return ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"))


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    names = ("runtime", "precision", "workspace", "batches", "compute_capability")
    return {name: getattr(args, name) for name in names if name in args}


def _check_paths(paths: Sequence[str], options: Mapping[str, Any] | None = None) -> None:
    """Refuse before the work what :func:`fxmerge.export` would refuse; ``options`` are for the engines among the paths."""
    from .exporters import files_written
    from .save import check_export

    engines = [path for path in paths if path.endswith(".engine")]
    for path in paths:
        check_export(path, **(options or {} if path in engines or not engines else {}))
    files = [file for path in paths for file in files_written(path)]
    for file in files:
        if files.count(file) > 1:
            raise UserError(f"{file} would be written twice: an engine comes with its .onnx and .engine.json")


def _check_folder(folder: Path) -> None:
    """Refuse before the work what :meth:`fxmerge.Result.save` would refuse after it."""
    from .serialize import load_documents

    if folder.is_dir() and any(folder.iterdir()):
        try:
            load_documents(folder)
        except StoreError as error:
            raise StoreError(
                f"--output {folder} is not empty and was not written by this version of fxmerge"
            ) from error
    elif folder.exists() and not folder.is_dir():
        raise StoreError(f"--output {folder} is a file; expected a folder")
    _check_writable(folder)


def _check_file(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder, or its folder does not exist")
    _check_writable(path.absolute())


def _check_writable(path: Path) -> None:
    above = next(parent for parent in path.parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise StoreError(f"{path} cannot be written: {above} is no folder, or there is no permission to write there")


def _fewer(plan: Plan) -> int:
    """How many convolutions fewer a plan leaves, before any lossless folding."""
    return sum(len(each.kept) + len(each.bypassed) - (each.kind == "merge") for each in plan.candidates)


def _plan_data(plan: Plan) -> Any:
    return json.loads(plan.to_json())


def _operations(gm: fx.GraphModule) -> int:
    return sum(1 for node in gm.graph.nodes if node.op in ("call_module", "call_function"))


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _show(args: argparse.Namespace, text: str, data: Mapping[str, Any]) -> None:
    _print(json.dumps(data, indent=1) if args.json else text)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except (
        BrokenPipeError
    ):  # the reader, such as head, has seen enough; what comes after the printing is still to be done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Every network of ``tests/zoo.py`` through the whole pipeline, counted in multiply-accumulates.

``python benchmarks/zoo.py`` writes a record to ``benchmarks/results/zoo.json`` after every network, and beside it the
table ``zoo.md`` that the README shows. Networks that are in the file already are not run again: ``--redo NAME`` does,
``--redo`` alone runs those with problems again; ``--only NAME`` runs no others, ``--table`` none. Every network has a
process of its own and a time limit, so that a crash loses one record. Networks of transformers and diffusers need the
extra: ``pip install 'fxmerge[zoo]'``.

Of every network: the captured graph computes what the model does; the empty plan changes nothing; plans for three budgets
are met or the least share that can be reached is recorded; the merged network equals the trainable one, also at
another batch size; every convolution has a decision with a reason; the exported ONNX file agrees at two batch sizes.
Whatever fails is written into the record under ``problems`` and counted in the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

import fxmerge
from fxmerge.calibration import Batch
from fxmerge.checks import check_equal, outputs_of, own_error, relative_error
from fxmerge.driver import Frontier
from fxmerge.errors import BudgetError
from fxmerge.graph import clone, graph_meta
from fxmerge.inputs import map_tensors, split_example
from fxmerge.regions import Mesh, all_series
from fxmerge.result import merge_graph

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo import ZOO, Entry

RESULTS = Path(__file__).with_name("results") / "zoo.json"
BUDGETS = (0.85, 0.7, 0.55)
MIDDLE = 0.7
SECONDS = 300.0


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ZOO), metavar="NAME", help="run no networks but these")
    parser.add_argument(
        "--redo", nargs="*", choices=list(ZOO), metavar="NAME", help="run these again (default those with problems)"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of a network (default %(default)s)")
    parser.add_argument("--record", choices=list(ZOO), help=argparse.SUPPRESS)  # the process of one network
    options = parser.parse_args()
    if options.record:
        logging.disable(logging.WARNING)
        print(json.dumps(record(ZOO[options.record])))
        return
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    again = [] if options.redo is None else options.redo or [name for name in done if done[name]["problems"]]
    for name in () if options.table else options.only or ZOO:
        if name not in done or name in again:
            done[name] = run(name, options.seconds)
            in_order = {known: done[known] for known in ZOO if known in done}
            RESULTS.write_text(json.dumps(in_order, indent=1) + "\n")
            print(f"{name}: {progress(done[name])}", flush=True)
    known = {name: done[name] for name in ZOO if name in done}
    RESULTS.with_suffix(".md").write_text(table(known) + "\n")
    print(summary(known))


def run(name: str, seconds: float) -> dict[str, Any]:
    """The record of one network, made in a process of its own."""
    entry = ZOO[name]
    facts: dict[str, Any] = {"family": entry.family, "kind": entry.kind}
    start = time.perf_counter()
    command = [sys.executable, __file__, "--record", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return {**facts, "problems": [f"no result within {seconds:.0f} seconds"]}
    if done.returncode:
        return {**facts, "problems": [done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "crashed"]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**facts, **found, "total": time.perf_counter() - start}


def record(entry: Entry) -> dict[str, Any]:
    """All about one network; what fails is a sentence under ``problems``, and what can still be done is done."""
    seconds: dict[str, float] = {}
    problems: list[str] = []
    found: dict[str, Any] = {"problems": problems, "seconds": seconds}
    with stage(seconds, problems, "build"):
        model = entry.build()
    if problems:
        return found
    inputs = split_example(entry.example())
    found["inputs"] = [list(each.shape[1:]) for each in [*inputs[0], *inputs[1].values()]]
    with stage(seconds, problems, "export"), torch.no_grad():
        torch.export.export(model, *inputs, strict=False)
    with stage(seconds, problems, "capture"):
        captured = fxmerge.capture(model, entry.example())
        expected = outputs_of(model, inputs)
        found["dynamic batch"] = graph_meta(captured)["dynamic_batch"]
        found["capture error"] = error = relative_error(outputs_of(captured, inputs), expected)
        allowed = max(1e-5, 20 * own_error(captured, inputs, expected))
        if error > allowed:
            problems.append(f"capture: differs from the model by {error:.1e}, allowed {allowed:.1e}")
    if problems:
        return found
    with stage(seconds, problems, "frontier"):
        frontier = fxmerge.frontier(model, entry.example(), runtime="macs", importance="magnitude")
    if problems:
        return found
    found.update(analysis(frontier))
    with stage(seconds, problems, "empty plan"):
        empty = frontier.apply(frontier.at(1.0))
        if empty.plan.entries or relative_error(outputs_of(empty.model, inputs), outputs_of(captured, inputs)):
            problems.append("empty plan: changes the network")
    found["budgets"] = {}
    for budget in BUDGETS:
        with stage(seconds, problems, f"budget {budget}"):
            found["budgets"][str(budget)] = compressed(frontier, budget, entry, problems, seconds)
    return found


def analysis(frontier: Frontier) -> dict[str, Any]:
    """What could be done to the network, and what could not and why."""
    enumeration = frontier.enumeration
    kinds = Counter(site.candidate.kind for site in enumeration.sites)
    meshes = sum(isinstance(child, Mesh) for series in all_series(enumeration.series[0]) for child in series.children)
    return {
        "convolutions": frontier.convolutions,
        "macs": frontier.original,
        "candidates": dict(kinds),
        "refusals": dict(Counter(refusal.code for refusal in enumeration.refusals).most_common()),
        "meshes": meshes,
        "plans": len(frontier),
        "least": frontier.points[0][0] / frontier.original,
        "merging plan": merging_plan(frontier),
    }


def merging_plan(frontier: Frontier) -> float | None:
    """How much more the cheapest plan within the middle budget that merges loses than the cheapest one; None: none merges."""
    within = [number for number, (latency, _) in enumerate(frontier.points) if latency <= MIDDLE * frontier.original]
    if not within:
        return None
    least = frontier.plan(within[-1]).loss
    plans = (frontier.plan(number) for number in reversed(within))
    return next((plan.loss / least if least else 1.0 for plan in plans if plan.merges), None)


def compressed(
    frontier: Frontier, budget: float, entry: Entry, problems: list[str], seconds: dict[str, float]
) -> dict[str, Any]:
    """One budget, or the least that can be reached: met, equal to the trainable form at two batch sizes, explained."""
    least = frontier.points[0][0] / frontier.original
    reached = least <= budget
    result = frontier.compress(budget) if reached else frontier.apply(frontier.plan(0))
    report = result.report
    for name in ("install", "check"):
        seconds[name] = seconds.get(name, 0.0) + report.seconds[name]
    for name in report.seconds.keys() - {"install", "check"}:
        seconds[f"frontier: {name}"] = report.seconds[name]
    if not reached:
        try:
            frontier.compress(budget)
            problems.append(f"budget {budget}: out of reach, and no BudgetError")
        except BudgetError as error:
            if f"({least:.1%})" not in str(error):
                problems.append(f"budget {budget}: the error does not name the smallest reachable: {error}")
    elif report.measured > budget * report.original:
        problems.append(f"budget {budget}: measured {report.measured / report.original:.3f}")
    if len(report.decisions) != report.before.convolutions or not all(each.reason for each in report.decisions):
        problems.append(f"budget {budget}: a convolution has no decision or no reason")
    merged = result.merge()
    batches = (2, 3) if graph_meta(result.model)["dynamic_batch"] else (2,)
    examples = [split_example(entry.example(batch, seed=batch)) for batch in batches]
    checks = [check_equal(result.model, merged, example, report.original_error) for example in examples]
    for example, checked in zip(examples, checks, strict=True):
        apart = error_in_double(result.model, example) if checked.caveat and not checked.exact else 0.0
        if apart > 1e-6:
            problems.append(
                f"budget {budget}: {checked.caveat}, and in float64 merged differs from relaxed by {apart:.1e}"
            )
    facts = {
        "reached": reached,
        "share": report.measured / report.original,
        "convolutions": report.after.convolutions,
        "merges": len(result.plan.merges),
        "changes": len(result.plan.entries),
        "error at batch": {batch: each.error for batch, each in zip(batches, checks, strict=True)},
        "allowed": max(each.allowed for each in checks),
        "dependence": report.dependence,
        "notes": list(report.notes),
    }
    if budget == MIDDLE:
        with stage(seconds, problems, "ONNX"), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fxmerge.export(result, Path(folder) / "net.onnx")
    return facts


def error_in_double(model: fx.GraphModule, example: Batch) -> float:
    """How far a trainable network and its fold are apart in float64: where float32 rounds too much to tell."""
    double = clone(model).double()
    wide = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, *example)
    return relative_error(outputs_of(merge_graph(double), wide), outputs_of(double, wide))


@contextmanager
def stage(seconds: dict[str, float], problems: list[str], name: str) -> Iterator[None]:
    """Time a stage; an exception becomes a problem."""
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        problems.append(f"{name}: {type(error).__name__}: {lines[0]}")
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def progress(found: dict[str, Any]) -> str:
    """One line for the terminal."""
    if found["problems"]:
        return "; ".join(found["problems"])
    middle = found["budgets"][str(MIDDLE)]
    return (
        f"{found['convolutions']} convolutions, least {found['least']:.2f}, at {MIDDLE} {middle['share']:.2f} with "
        f"{middle['merges']} merges, {found['total']:.0f} s"
    )


def merges(found: dict[str, Any]) -> bool:
    """Whether the plan at the middle budget, or a plan within it that loses more, merges."""
    return found.get("merging plan") is not None


def summary(done: dict[str, Any]) -> str:
    """The sentence above the table."""
    middles = [found.get("budgets", {}).get(str(MIDDLE), {}) for found in done.values()]
    best = sum(bool(middle.get("reached") and middle["merges"]) for middle in middles)
    return (
        f"{len(done)} networks of {len({found['family'] for found in done.values()})} families; "
        f"{sum(not found['problems'] for found in done.values())} without a problem; "
        f"{sum(merges(found) for found in done.values())} have a plan at {MIDDLE} of the multiply-accumulates that merges, "
        f"and of {best} it is the best plan."
    )


def table(done: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        summary(done),
        "",
        "Least: smallest reachable share of the multiply-accumulates. Merges: convolutions that the best plan at "
        f"{MIDDLE} makes out of several, 0 where it only removes; in brackets, of the least, where {MIDDLE} is out of reach. "
        "Seconds, one thread: torch.export alone; capture; analyse, score and solve; install and check at three budgets; ONNX.",
        "",
        "| network | family | convs | merge candidates | refusals | least | merges | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {found['family']} | {_cells(found)} |" for name, found in done.items()]
    failed = {name: found["problems"] for name, found in done.items() if found["problems"]}
    if failed:
        lines += ["", "Problems:", ""]
        lines += [f"- {name}: {'; '.join(problems)}" for name, problems in failed.items()]
    return "\n".join(lines)


def _cells(found: dict[str, Any]) -> str:
    if str(MIDDLE) not in found.get("budgets", {}):
        return " | ".join([*(str(found.get(name, "-")) for name in ("convolutions",)), "-", "-", "-", "failed", "-"])
    middle = found["budgets"][str(MIDDLE)]
    spent = found["seconds"]
    analysed = sum(
        value for name, value in spent.items() if name.startswith("frontier: ") and not name.endswith("capture")
    )
    stages = (spent["export"], spent["capture"], analysed, spent["install"] + spent["check"], spent.get("ONNX", 0.0))
    refusals = ", ".join(f"{count} {code}" for code, count in found["refusals"].items()) or "none"
    cells = [
        str(found["convolutions"]),
        str(found["candidates"].get("merge", 0)),
        refusals,
        f"{found['least']:.2f}",
        str(middle["merges"]) if middle["reached"] else f"({middle['merges']})",
        ", ".join(f"{value:.1f}" for value in stages),
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()

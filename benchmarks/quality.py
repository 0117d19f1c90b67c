"""What a latency costs in quality: fxmerge against its own baselines and channel pruning, before and after fine-tuning.

``pip install '.[bench]'``, then ``python benchmarks/quality.py`` writes a record to ``benchmarks/results/quality.json`` after every
network, and beside it the table ``quality.md``. What is in the file already is not done again. Trained networks, latencies and
losses are kept in ``--work``, and what unfinished runs measured. The main table, two budgets and three seeds, takes 89 minutes on
two cores, 23 of them to train nine networks; ``--budgets 0.8 0.4 0.3 --seeds 0`` is for the rest.

Of every network (tests/tasks.py), for every budget of ONNX Runtime's latency on one thread:

- ``refit``: what ``compress(model, example, budget, calibration=...)`` does, but with 40 networks of search instead of a minute,
  which are about as many on two cores.
- ``polish``: the same network after 300 steps of polish, 100 of the denoising network.
- ``sum of losses``: ``refit`` without search.
- ``compose``: weights multiplied out, batch norms re-estimated, as the paper does.
- ``depth``, ``layer``: the paper's baselines, with refitted weights. They and ``compose`` have to keep the last convolution of
  the denoising network, because they would return its input, which no fine-tuning mends.
- ``channels``: channel pruning by torch-pruning as its README shows it (group L2 norm, one ratio for all layers), batch norms
  re-estimated. Of ratios in steps of 5 %, widths rounded to eights or not, the network with most parameters whose
  measured latency is within the budget: widths that the runtime's vectors do not divide are slower than the original.

Calibration, on 2,048 digits or 128 crops of photographs, has no labels. Fine-tuning is the same few steps with labels for all,
of ``result.model`` or the pruned network; and of the original, because so few of them can also do harm.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.calibration import read_calibration
from fxmerge.errors import BudgetError
from fxmerge.graph import clone
from fxmerge.passes import PolishPass
from fxmerge.runtimes import get_runtime, interleave

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tasks import TASKS, finetune, trained
from zoo import settle

RESULTS = Path(__file__).with_name("results") / "quality.json"
RUNTIME = "onnxruntime:threads=1"
METHODS: dict[str, dict[str, Any]] = {
    "refit": {"search": 40},
    "sum of losses": {"search": None},
    "compose": {"fit": "compose", "search": None},
    "depth": {"method": "depth", "search": None},
    "layer": {"method": "layer", "search": None},
}
ROUNDS = ((), ("refit", "sum of losses"), ("compose", "depth", "layer", "channels"))
"""Methods of the jobs that a network is done in, one after the other; the first is the original alone. Small jobs keep all
processes busy to the end."""
ROWS = ("refit", "polish", *list(METHODS)[1:], "channels")
RATIOS = [number / 20 for number in range(1, 20)]
SECONDS, TURNS = 0.5, 3
"""Of one timing, and how many of a pruned network: one alone can be far off on a machine that is shared."""


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "channels"], choices=[*METHODS, "channels"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.65, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where records are written")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="folder of what can be made again")
    parser.add_argument("--processes", type=int, default=2, help="side by side, of one thread each")
    options = parser.parse_args()
    records: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    networks = list(itertools.product(sorted(options.tasks, key=list(TASKS).index, reverse=True), options.seeds))
    rounds = {
        network: [[method for method in options.methods if method in each] for each in ROUNDS] for network in networks
    }
    running: dict[Future[dict[str, Any]], tuple[str, int]] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawn, torch.set_num_threads, (1,)) as pool:

        def start(network: tuple[str, int]) -> None:
            """Queue what comes next of a network, behind what the others have queued."""
            if rounds[network]:
                methods = rounds[network].pop(0)
                running[pool.submit(run, *network, methods, options.budgets, records, options.work)] = network

        for network in networks:
            start(network)
        while running:
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                records |= job.result()
                write(records, options.results)
                start(running.pop(job))


def run(
    name: str, seed: int, methods: list[str], budgets: list[float], known: dict[str, Any], work: Path
) -> dict[str, Any]:
    """What is missing of some methods for one network, written to a file in ``work`` after every budget; its records."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    part = work / f"{name}-{seed}-{'-'.join(methods) or 'original'}.json"
    records: dict[str, Any] = json.loads(part.read_text()) if part.exists() else {}
    records |= {each: record for each, record in known.items() if each.startswith(f"{name}, seed {seed}, ")}

    def keep(row: str, budget: float, record: dict[str, Any]) -> None:
        records[key(name, seed, row, budget)] = record
        part.write_text(json.dumps(records))
        print(f"{time.strftime('%H:%M:%S')} {key(name, seed, row, budget)}: {record}", flush=True)

    if key(name, seed, "original", 1) not in records:
        keep("original", 1, finetuned_original(name, seed, work))
    for method in methods:
        missing = [b for b in budgets if any(key(name, seed, row, b) not in records for row in rows_of(method))]
        for budget, found in measure(name, seed, method, missing, work) if missing else ():
            for row, record in found.items():
                keep(row, budget, record)
    return records


def key(name: str, seed: int, method: str, budget: float) -> str:
    """Under what a record is kept."""
    return f"{name}, seed {seed}, {method}, {budget:g}"


def write(records: dict[str, Any], path: Path) -> None:
    """All that is measured, and its table."""
    path.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    path.with_suffix(".md").write_text(table(records))


def finetuned_original(name: str, seed: int, work: Path) -> dict[str, Any]:
    """The record of the original."""
    task, model = TASKS[name], trained(name, seed, work)
    before = task.quality(model)
    finetune(model, task, seed)
    return {"before": before, "after": task.quality(model)}


def measure(
    name: str, seed: int, method: str, budgets: list[float], work: Path
) -> Iterator[tuple[float, dict[str, dict[str, Any]]]]:
    """Of every budget the records of one method, by the name of the row."""
    task, model = TASKS[name], trained(name, seed, work)
    images = task.calibration()
    example = task.test()[0][: task.batch]
    compress = (
        pruner(model, example, images)
        if method == "channels"
        else ours(name, seed, method, model, example, images, work)
    )
    for budget in budgets:
        start = time.perf_counter()
        try:
            networks, share = compress(budget)
        except BudgetError as error:
            yield budget, {row: {"refused": str(error)} for row in rows_of(method)}
            continue
        seconds, found = time.perf_counter() - start, {}
        for row, network in networks.items():
            before = task.quality(network)
            finetune(network, task, seed)
            found[row] = {
                "share": share,
                "before": before,
                "after": task.quality(network),
                "convolutions": sum(isinstance(module, nn.Conv2d) for module in network.modules()),
                "seconds": seconds,
            }
        yield budget, found


def rows_of(method: str) -> tuple[str, ...]:
    """The rows that a method fills."""
    return (method, "polish") if method == "refit" else (method,)


Compress = Callable[[float], tuple[dict[str, nn.Module], float]]
"""From a budget to networks that train, by the name of the row, and their measured share of the original."""


def ours(name: str, seed: int, method: str, model: nn.Module, example: Tensor, images: Tensor, work: Path) -> Compress:
    """By :func:`fxmerge.compress`, step by step."""
    options = METHODS[method]
    parts = torch.split(images, 32)
    frontier = fxmerge.frontier(
        model,
        example,
        runtime=RUNTIME,
        calibration=parts,
        store=work / "latency.sqlite",
        importance_table=work / f"{name}-{seed}-{options.get('fit', 'refit')}.sqlite",
        exclude=() if method in ("refit", "sum of losses") else TASKS[name].baselines_exclude,
        measure_seconds=SECONDS,
        **options,
    )

    @functools.cache
    def polish() -> PolishPass:
        original = clone(fxmerge.capture(model, example)).eval()
        return PolishPass(original, read_calibration(parts, None, original, ((example,), {})), TASKS[name].polish)

    def compress(budget: float) -> tuple[dict[str, nn.Module], float]:
        result = frontier.compress(budget)
        networks: dict[str, nn.Module] = {method: result.model}
        if "polish" in rows_of(method):
            networks["polish"] = polish()(copy.deepcopy(result.model)).graph_module
        return networks, result.report.measured / result.report.original

    return compress


def pruner(model: nn.Module, example: Tensor, images: Tensor) -> Compress:
    """The network with as many channels as the budget allows; both are timed folded, as deployed."""
    runtime = get_runtime(RUNTIME)
    original = runtime.build(fxmerge.fold(model, example), (example,), {})
    made = (pruned(model, example, ratio, multiple) for ratio in RATIOS for multiple in (None, 8))
    # Several ratios round to the same widths.
    different = {tuple(parameter.shape for parameter in network.parameters()): network for network in made}
    candidates = sorted(different.values(), key=parameters, reverse=True)

    @functools.cache
    def share(number: int) -> float:
        mine = runtime.build(fxmerge.fold(candidates[number], example), (example,), {})
        turns = [interleave([mine, original], SECONDS) for _ in range(TURNS)]
        return statistics.median(found.latency / whole.latency for found, whole in turns)

    def compress(budget: float) -> tuple[dict[str, nn.Module], float]:
        within = next((number for number in range(len(candidates)) if share(number) <= budget), None)
        if within is None:
            raise BudgetError(f"channel pruning does not reach {budget:.0%}")
        network = copy.deepcopy(candidates[within])
        settle(network, torch.split(images, 32))
        return {"channels": network}, share(within)

    return compress


def parameters(network: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in network.parameters())


def pruned(model: nn.Module, example: Tensor, ratio: float, multiple: int | None) -> nn.Module:
    """A copy with fewer channels, of a multiple, everywhere but in what gives the outputs."""
    import torch_pruning as tp

    network = copy.deepcopy(model)
    last = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]
    pruner = tp.pruner.MetaPruner(
        network,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[last],
        round_to=multiple,
    )
    pruner.step()
    return network


def table(records: dict[str, dict[str, Any]]) -> str:
    """For every network and budget all methods side by side; below it every mean and standard deviation. Markdown."""
    groups: dict[tuple[str, float], dict[str, dict[str, dict[str, Any]]]] = {}
    originals: dict[tuple[str, str], dict[str, Any]] = {}
    for name, record in records.items():
        task, seed, method, asked = name.split(", ")
        if method == "original":
            originals[task, seed] = record
        else:
            groups.setdefault((task, float(asked)), {}).setdefault(method, {})[seed] = record
    ordered = sorted(groups.items(), key=lambda each: (list(TASKS).index(each[0][0]), -each[0][1]))
    short = [f"| network, budget | seeds | original | {' | '.join(ROWS)} |", "|---" * (3 + len(ROWS)) + "|"]
    full = [
        "| network | budget | method | measured | original | not fine-tuned | fine-tuned | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, budget), methods in ordered:
        unit, seeds = TASKS[task].unit, {seed for found in methods.values() for seed in found}
        original = f"{arrow([originals[task, seed] for seed in seeds])} {unit}"
        cells = [arrow(list(methods[row].values())) if row in methods else "" for row in ROWS]
        short.append(f"| {task}, {budget:g} | {len(seeds)} | {original} | {' | '.join(cells)} |")
        for method in sorted(methods, key=ROWS.index):
            done = {seed: record for seed, record in methods[method].items() if "after" in record}
            if not done:
                full.append(f"| {task} | {budget:g} | {method} | out of reach | | | | {len(methods[method])} |")
                continue
            share = statistics.mean(record["share"] for record in done.values())
            values = [spread([originals[task, seed]["before"] for seed in done], unit)]
            values += [spread([record[name] for record in done.values()], unit) for name in ("before", "after")]
            full.append(f"| {task} | {budget:g} | {method} | {share:.3f} | {' | '.join(values)} | {len(done)} |")
    return "\n".join([*short, "", *full]) + "\n"


def arrow(records: list[dict[str, Any]]) -> str:
    """Means before and after fine-tuning."""
    done = [record for record in records if "after" in record]
    if not done:
        return "-"
    return " → ".join(f"{statistics.mean(record[name] for record in done):.1f}" for name in ("before", "after"))


def spread(values: list[float], unit: str) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f} {unit}" if len(values) > 1 else f"{mean} {unit}"


if __name__ == "__main__":
    main()

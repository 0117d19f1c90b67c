"""How far predicted latencies are from measured ones, and budgets from what is delivered.

``python benchmarks/latency.py`` writes a record to ``benchmarks/results/latency.json`` after every case, and beside it the
table ``latency.md`` that the README shows. Cases that are in the file already are not run again (``--again`` does). A case
is a network, a batch size and a number of threads; ``--runtime NAME`` measures on another runtime than ONNX Runtime's CPU
provider, ``--results FILE`` writes elsewhere.

Of every case, in one run:

1. Rewrites: ten random plans are built, exported and timed in turns with the original, in two sessions. Shown is
   the error of the prediction, the sum of fxmerge's table, and beside it that of the paper's protocol: every layer alone,
   mean of its runs, added up; and of that with one scale, from the original. The plans are drawn by another generator than
   the covering networks that the table was measured in; those whose merges would fold into one another are passed over, because the
   solver takes the one merge of both.
2. Budgets: the closed loop's first network against its prediction; the delivered network, measured afresh, against what
   was requested; and the next larger plan of the frontier, which has to be over the budget.
3. Counting instead of measuring: the same budget asked of ``macs``, and what the network that comes out takes on the runtime.
4. Seconds: of the whole table, of the same frontier again from the store, and of the paper's protocol on the same layers:
   building each, and 500 runs (300 to warm up) at the mean that was measured.

``repeatability`` is the largest relative difference between the two best timings of one network in the case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import fx

import fxmerge
from fxmerge.candidates import Candidate
from fxmerge.closed_loop import TOLERANCE
from fxmerge.driver import Frontier
from fxmerge.errors import BudgetError
from fxmerge.graph import META, between, by_id, convolutions, node_id
from fxmerge.passes.profile_latency import LatencyTable, layer_signatures
from fxmerge.result import merge_graph
from fxmerge.runtimes import LayerSignature, Timing, get_runtime
from fxmerge.runtimes.onnxruntime import conv_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo import NETWORKS, image_shape, seed_images

RESULTS = Path(__file__).with_name("results") / "latency.json"
REWRITES = 10
BUDGETS = (0.8, 0.6, 0.45)
ALONE_SECONDS = 0.1
ALONE_RUNS = 10
PAPER_RUNS = 500
SESSIONS = 2
"""Of each rewrite; the faster counts."""
SECONDS = 3.0
"""For timing a network against the original."""


def main() -> None:
    """Run the cases that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", default="onnxruntime", help="name of a runtime (default onnxruntime)")
    parser.add_argument("--networks", nargs="+", default=["resnet34", "mobilenet_v2"], choices=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1, 2], help="of runtimes that take them (default 1 2)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where records are written")
    parser.add_argument("--again", action="store_true", help="run all cases again")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    records: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    threaded = options.runtime in ("onnxruntime", "torch")
    for threads in options.threads if threaded else [None]:
        for name in options.networks:
            for batch in options.batches:
                spec = options.runtime if threads is None else f"{options.runtime}:threads={threads}"
                case = f"{name}, batch {batch}, {spec}"
                if case in records and not options.again:
                    continue
                print(case, flush=True)
                records[case] = measure(name, batch, spec)
                options.results.write_text(json.dumps(records, indent=1) + "\n")
                options.results.with_suffix(".md").write_text(table(records))
                print(table({case: records[case]}), flush=True)


def measure(name: str, batch: int, spec: str) -> dict[str, Any]:
    """The record of one case."""
    runtime = get_runtime(spec)
    start = time.perf_counter()
    torch.set_num_threads(1)
    model = NETWORKS[name]()
    images = seed_images(image_shape(name, batch))
    with TemporaryDirectory() as folder:
        frontier, again = (
            fxmerge.frontier(
                model, images, runtime=runtime, store=Path(folder, "latencies.sqlite"), measure_seconds=SECONDS
            )
            for _ in range(2)
        )
    seconds: dict[str, float | None] = {
        "frontier": time.perf_counter() - start,
        **frontier._seconds,
        "again": again._seconds["measure"],
    }
    timings: list[Timing] = []
    alone, seconds["paper"], layers = alone_table(frontier) if runtime.name == "onnxruntime" else (None, None, None)
    deployed = merge_graph(frontier._setup.base)
    plans = (plan for plan in random_plans(frontier) if apart(frontier, deployed, plan))
    rewrites = [rewrite(frontier, plan, alone, timings) for plan in itertools.islice(plans, REWRITES)]
    budgets = {str(share): budget(frontier, share, timings) for share in BUDGETS}
    counting = fxmerge.frontier(model, images, runtime="macs")
    for share in BUDGETS:
        budgets[str(share)]["counted"] = counted(frontier, counting, share, timings)
    return {
        "environment": runtime.environment(),
        "original": frontier.original,
        "table": {
            "scale": frontier._table.scale,
            "rest": frontier._table.rest,
            "plans": len(frontier),
            "layers": layers,
        },
        "repeatability": max(timing.repeatability for timing in timings),
        "rewrites": rewrites,
        "budgets": budgets,
        "seconds": {**seconds, "all": time.perf_counter() - start},
    }


def apart(frontier: Frontier, deployed: fx.GraphModule, plan: tuple[Candidate, ...]) -> bool:
    """Whether no two neighbours of a plan fold into one convolution: of those the solver takes the merge of both.

    ``deployed`` is the original, folded.
    """
    merged = frontier._install(frontier._priced(plan), None)[0]
    gone = {name for c in plan for name in (*c.kept, *c.bypassed)}
    left = sum(gone.isdisjoint(node.meta[META].get("made_of", [node_id(node)])) for node, _ in convolutions(deployed))
    return left + sum(c.geometry is not None for c in plan) == sum(1 for _ in convolutions(merged))


def random_plans(frontier: Frontier) -> Iterator[tuple[Candidate, ...]]:
    """Plans of one to a dozen disjoint candidates, each as likely as any other that was measured."""
    nodes = by_id(frontier._setup.base)
    candidates = [site.candidate for site in frontier._useful]
    inside = {c: set(map(node_id, between(nodes[c.entry], nodes[c.exit]))) for c in candidates}
    for number in itertools.count():
        draw = random.Random(1000 + number)  # noqa: S311 - a seeded choice
        chosen: list[Candidate] = []
        used: set[str] = set()
        wanted = draw.randint(1, 12)
        for candidate in draw.sample(candidates, len(candidates)):
            joins = {join for join, _ in candidate.cuts if candidate.kind == "drop"}
            if len(chosen) < wanted and used.isdisjoint(inside[candidate] | joins):
                chosen.append(candidate)
                used |= inside[candidate] | joins
        yield tuple(chosen)


def rewrite(
    frontier: Frontier, chosen: tuple[Candidate, ...], alone: LatencyTable | None, timings: list[Timing]
) -> dict[str, Any]:
    """Predicted and measured latency of one plan, as shares of the original."""
    plan = frontier._priced(chosen)
    network = frontier._install(plan, None)[0]
    # Two sessions of one network may differ by more than its runs do: where its memory lies is part of what it takes.
    pairs = [frontier._measure(network) for _ in range(SESSIONS)]
    timings += [timing for pair in pairs for timing in pair]
    measured, original = (min(timing.latency for timing in each) for each in zip(*pairs, strict=True))
    share = measured / original
    record = {"candidates": len(chosen), "measured": share, "predicted": plan.predicted / frontier.original}
    if alone is not None:
        total = alone.total(chosen)
        record["alone"] = total / original
        record["alone, scaled"] = total / alone.total(())
    return record


def alone_table(frontier: Frontier) -> tuple[LatencyTable, float, int]:
    """The paper's protocol: every measured layer alone, the mean of its runs; its seconds, and how many layers these are."""
    base, batch = frontier._setup.base, frontier._setup.batch
    runtime: Any = frontier._setup.runtime
    kept, merged = layer_signatures(base, frontier.enumeration, batch)
    merged = {c: signature for c, signature in merged.items() if math.isfinite(frontier._table.of(c))}
    latencies: dict[LayerSignature, float] = {}
    seconds = 0.0
    for signature in {*kept.values(), *merged.values()}:
        start = time.perf_counter()
        run, latencies[signature] = mean_alone(runtime, signature)
        seconds += run - start + PAPER_RUNS * latencies[signature] / 1e3
    inside = {c: (*c.kept, *c.bypassed) for c in (site.candidate for site in frontier.enumeration.sites)}
    known = {name: latencies[signature] for name, signature in kept.items()}
    alone = {candidate: latencies[signature] for candidate, signature in merged.items()}
    return LatencyTable("ms", known, alone, {}, inside, frontier.original, 1.0, 0.0), seconds, len(latencies)


def mean_alone(runtime: Any, signature: LayerSignature) -> tuple[float, float]:
    """When a session that holds one layer was ready, and its milliseconds: the mean of all runs but the first."""
    geometry, draw = signature.geometry, np.random.default_rng(0)
    shape = (signature.batch, geometry.in_channels, *signature.in_size)
    weight = draw.standard_normal(
        (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel), dtype=np.float32
    )
    bias = np.zeros(geometry.out_channels, dtype=np.float32)
    model = conv_model(geometry, weight, bias, shape, signature.activation)
    session = runtime._session(model.SerializeToString(), runtime._options())
    feeds = {"x": draw.standard_normal(shape, dtype=np.float32)}
    ready = time.perf_counter()
    session.run(None, feeds)
    runs: list[float] = []
    end = ready + ALONE_SECONDS
    while len(runs) < ALONE_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, feeds)
        runs.append(time.perf_counter() - start)
    return ready, statistics.mean(runs) * 1e3


def budget(frontier: Frontier, share: float, timings: list[Timing]) -> dict[str, Any]:
    """What the closed loop delivers for a budget, measured afresh, and what the next larger plan measures."""
    try:
        result = frontier.compress(share)
    except BudgetError as error:
        return {"out of reach": str(error)}
    report = result.report
    measured, original = frontier._measure(result.merge())
    timings += [measured, original]
    index = next(i for i in range(len(frontier)) if frontier.plan(i).candidates == result.plan.candidates)
    larger = None
    if index + 2 < len(frontier):
        timing, reference = frontier._measure(frontier._install(frontier.plan(index + 1), None)[0])
        timings += [timing, reference]
        larger = timing.latency / reference.latency
    return {
        "builds": report.builds,
        "reported": report.measured / report.original,
        "delivered": measured.latency / original.latency,
        "next larger": larger,
        "convolutions": report.after.convolutions,
    }


def counted(frontier: Frontier, counting: Frontier, share: float, timings: list[Timing]) -> dict[str, float]:
    """What a plan for a share of the multiply-accumulates takes, and what the runtime's own plan of that latency loses."""
    result = counting.compress(share)
    measured, original = frontier._measure(result.merge())
    timings += [measured, original]
    latency = measured.latency / original.latency
    smallest = frontier.points[0][0] / frontier.original
    same = frontier.at(max((1 + TOLERANCE) * latency, smallest))
    return {"measured": latency, "loss": result.plan.loss, "loss of the measured plan": same.loss}


def errors(rewrites: Sequence[dict[str, Any]], key: str) -> str:
    """Mean and worst relative error of a prediction, in per cent."""
    if key not in rewrites[0]:
        return ""
    found = [abs(each[key] / each["measured"] - 1) for each in rewrites]
    return f"{statistics.mean(found):.1%} / {max(found):.1%}"


def table(records: dict[str, dict[str, Any]]) -> str:
    """All cases in Markdown: prediction errors, then budgets."""
    lines = [
        "Error of the predicted end-to-end latency over ten random rewrites, mean / worst:",
        "",
        "| case | original | fxmerge's table | each layer alone, mean | same, scaled | repeatability |",
        "|---|---|---|---|---|---|",
    ]
    for case, record in records.items():
        shown = [errors(record["rewrites"], key) for key in ("predicted", "alone", "alone, scaled")]
        lines.append(f"| {case} | {record['original']:.2f} ms | {' | '.join(shown)} | {record['repeatability']:.1%} |")
    lines += [
        "",
        "Budgets, as shares of the original: what the closed loop's first network was predicted and measured, what was "
        "delivered, measured afresh, and the next larger plan:",
        "",
        "| case | budget | first: predicted, measured | builds | delivered | next larger |",
        "|---|---|---|---|---|---|",
    ]
    for case, record in records.items():
        for share, found in record["budgets"].items():
            if "builds" not in found:
                lines.append(f"| {case} | {share} | {found['out of reach'].split('. ')[0]} | | | |")
                continue
            predicted, measured = found["builds"][0]
            larger = "" if found["next larger"] is None else f"{found['next larger']:.3f}"
            lines.append(
                f"| {case} | {share} | {predicted:.3f}, {measured:.3f} | {len(found['builds'])} | {found['delivered']:.3f} | "
                f"{larger} |"
            )
    lines += [
        "",
        "The same budget asked of `macs`: what its network takes on the runtime, and beside it what the runtime's own plan "
        "delivers; the loss of the plan from `macs`, and of the runtime's plan of that latency, or at most 2 % more by prediction:",
        "",
        "| case | budget | from macs: measured | from the runtime: measured | loss from macs | of the runtime's at that latency |",
        "|---|---|---|---|---|---|",
    ]
    for case, record in records.items():
        for share, found in record["budgets"].items():
            other = found["counted"]
            delivered = f"{found['delivered']:.3f}" if "builds" in found else ""
            lines.append(
                f"| {case} | {share} | {other['measured']:.3f} | {delivered} | {other['loss']:.4g} | "
                f"{other['loss of the measured plan']:.4g} |"
            )
    lines += [
        "",
        "Seconds of the latency table, of the same from the store, and of the paper's protocol on the same layers:",
        "",
        "| case | layers | table | from the store | paper's protocol |",
        "|---|---|---|---|---|",
    ]
    for case, record in records.items():
        found = record["seconds"]
        if found["paper"] is not None:
            layers = record["table"]["layers"]
            lines.append(
                f"| {case} | {layers} | {found['measure']:.1f} | {found['again']:.1f} | {found['paper']:.1f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

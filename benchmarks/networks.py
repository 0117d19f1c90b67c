"""Published networks at their published sizes through the whole pipeline, at three budgets each.

``python benchmarks/networks.py`` writes ``benchmarks/results/networks.json`` after every network, and beside it the table
``networks.md``, of which the README shows a part. Networks that are in the file already are not run again (``--again``
does). Random weights with batch-norm statistics from random images; importance is ``magnitude``; every result is exported
and its ONNX compared with torch at two batch sizes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import fxmerge
from fxmerge.runtimes.onnxruntime import OnnxRuntime

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo import NETWORKS, calibrate, dependence, image_shape, seed_images

RESULTS = Path(__file__).with_name("results") / "networks.json"
BUDGETS = (0.8, 0.6, 0.45)
MEASURED = ("resnet18", "mobilenet_v2")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETWORKS), help="networks to run (default all)")
    parser.add_argument("--again", action="store_true", help="run networks that are in the results already")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default 224)")
    options = parser.parse_args()
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.names:
        if name not in done or options.again:
            done[name] = run(name, options.size)
            RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(done) + "\n")
    print(table(done))


def run(name: str, size: int) -> dict[str, Any]:
    """Everything about one network."""
    start = time.perf_counter()
    model = calibrate(NETWORKS[name](size=size), image_shape(name, 4, size), passes=4)
    example = seed_images(image_shape(name, 1, size), seed=1)
    record: dict[str, Any] = {
        "size": size,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "fxmerge": fxmerge.__version__,
        },
        "dependence": dependence(model, image_shape(name, 2, size)),
        "budgets": [],
    }
    frontiers = [fxmerge.frontier(model, example, runtime="macs")]
    if name in MEASURED:
        frontiers.append(fxmerge.frontier(model, example, runtime=OnnxRuntime(threads=1), store=None))
    for frontier in frontiers:
        for budget in BUDGETS:
            result = frontier.compress(budget)
            report = result.report
            print(f"{name} {budget} {report!r}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                fxmerge.export(result, Path(folder) / "net.onnx")
                exported = time.perf_counter() - begin
            record["candidates"], record["refusals"] = dict(report.candidates), dict(report.refusals)
            record["budgets"].append(
                {
                    "unit": report.unit,
                    "budget": budget,
                    "measured": report.measured / report.original,
                    "repeatability": report.repeatability,
                    "convolutions": [report.before.convolutions, report.after.convolutions],
                    "merges": len(result.plan.merges),
                    "error": report.error,
                    "allowed": report.error_allowed,
                    "seconds": {**report.seconds, "export": exported},
                }
            )
    record["seconds"] = time.perf_counter() - start
    return record


def table(done: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| network | unit | budget | measured | convolutions | merges | error / allowed | "
        "seconds: capture, analyse, measure, install, check, export |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, record in done.items():
        for row in record["budgets"]:
            before, after = row["convolutions"]
            stages = ("capture", "analyse", "measure", "install", "check", "export")
            seconds = ", ".join(f"{row['seconds'].get(stage, 0.0):.1f}" for stage in stages)
            lines.append(
                f"| {name} | {row['unit']} | {row['budget']} | {row['measured']:.3f} | {before} → {after} | {row['merges']} "
                f"| {row['error']:.0e} / {row['allowed']:.0e} | {seconds} |"
            )
    lines += ["", "| network | candidates | refusals |", "|---|---|---|"]
    for name, record in done.items():
        listed = [
            ", ".join(f"{count} {kind}" for kind, count in record[key].items()) for key in ("candidates", "refusals")
        ]
        lines.append(f"| {name} | {listed[0]} | {listed[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

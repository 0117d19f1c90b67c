"""How well each importance ranks candidates, and how long it takes.

``pip install '.[bench]'``, then ``python benchmarks/estimators.py`` writes a record to ``benchmarks/results/estimators.json`` after
every network, and beside it the table ``estimators.md``. Losses and trained networks are kept in ``--work``; what is there is
not done again.

Of two trained networks (tests/tasks.py) candidates are drawn evenly over all that would be faster in multiply-accumulates. The
truth is, for each alone: installed with refitted weights, fine-tuned with labels for some steps, the loss on test images less that
of the original fine-tuned in the same way. Shown is Spearman's rank correlation of each estimator's losses with it, and seconds per
candidate, what the candidates share included. ``finetune`` is the paper's Algorithm 2 with a third of the steps.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import operator
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.calibration import read_calibration
from fxmerge.candidates import Candidate
from fxmerge.estimators import Distortion, Estimator, Local, Magnitude
from fxmerge.fitting import apply_candidates
from fxmerge.graph import by_id, clone
from fxmerge.passes.enumerate_segments import enumerate_segments
from fxmerge.passes.profile_latency import profile_latency
from fxmerge.performance import Finetune
from fxmerge.runtimes import get_runtime

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tasks import STEPS, TASKS, Task, batches, finetune, trained

RESULTS = Path(__file__).with_name("results") / "estimators.json"
IMAGES = 256


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["ResNet-20", "MobileNetV2"], choices=list(TASKS))
    parser.add_argument("--candidates", type=int, default=40, help="of each network (default: 40)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where records are written")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="folder of what can be made again")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    records: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    for name in options.tasks:
        if name in records:
            continue
        records[name] = measure(name, options.candidates, options.work)
        options.results.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
        options.results.with_suffix(".md").write_text(table(records))
        print(table(records), flush=True)


def measure(name: str, count: int, work: Path) -> dict[str, Any]:
    """The record of one network."""
    task, model = TASKS[name], trained(name, 0, work)
    images = task.calibration()[:IMAGES]
    example = images[:2]
    gm = clone(fxmerge.capture(model, example)).eval()
    data = read_calibration(torch.split(images, 32), None, gm, ((example,), {}))
    chosen = draw(gm, example, count)
    path = work / f"{name}-truth-{count}.json"
    truth: list[float] = json.loads(path.read_text()) if path.exists() else []
    reference = finetuned_loss(copy.deepcopy(gm), task)
    for candidate in chosen[len(truth) :]:
        installed, _ = apply_candidates(gm, (candidate,), data, "refit")
        truth.append(finetuned_loss(installed, task) - reference)
        path.write_text(json.dumps(truth))
    subset = itertools.islice(batches(task, 4242), 2 * STEPS // 3)
    estimators: dict[str, Estimator] = {
        "distortion": Distortion(data, fit="refit"),
        "local": Local(data, fit="refit"),
        "distortion, composed": Distortion(data, fit="compose"),
        "magnitude": Magnitude(),
        "finetune": Finetune(
            subset, lambda outputs, batch: task.loss(outputs, batch[1]), inputs=operator.itemgetter(0)
        ).installing(data, "refit", 2**31),
    }
    rows = {}
    for title, estimator in estimators.items():
        start = time.perf_counter()
        score = estimator.prepare(gm, chosen)
        losses = [score(candidate) for candidate in chosen]
        rows[title] = {
            "spearman": float(spearmanr(losses, truth).statistic),
            "seconds": (time.perf_counter() - start) / len(chosen),
        }
        print(name, title, rows[title], flush=True)
    return {"candidates": len(chosen), "estimators": rows}


def draw(gm: fx.GraphModule, example: Tensor, count: int) -> list[Candidate]:
    """Candidates that save something, evenly over their number; those with one entry behind each other."""
    enumeration = enumerate_segments(gm)
    latency = profile_latency(gm, enumeration, get_runtime("macs"), len(example), original=1.0)
    sites = [s.candidate for s in enumeration.sites if latency.of(s.candidate) < latency.replaced(s.candidate)]
    found = list(dict.fromkeys(sites))
    chosen = set(random.Random(0).sample(range(len(found)), min(count, len(found))))  # noqa: S311 - a seeded choice
    order = {name: number for number, name in enumerate(by_id(gm))}
    return sorted((found[number] for number in chosen), key=lambda candidate: (order[candidate.entry], str(candidate)))


def finetuned_loss(network: nn.Module, task: Task) -> float:
    """The loss on test images after a short fine-tuning."""
    finetune(network, task, 0)
    return float(task.loss(task.outputs(network), task.test()[1]))


def table(records: dict[str, Any]) -> str:
    """Correlation and seconds of every estimator on every network, in Markdown."""
    lines = ["| network | candidates | importance | Spearman | seconds a candidate |", "|---|---|---|---|---|"]
    for name, record in records.items():
        for title, row in sorted(record["estimators"].items(), key=lambda each: -each[1]["spearman"]):
            lines.append(
                f"| {name} | {record['candidates']} | {title} | {row['spearman']:.2f} | {row['seconds']:.3f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

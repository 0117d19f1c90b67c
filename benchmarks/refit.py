"""What a refit costs, and that few images do no harm.

``pip install '.[bench]'``, then ``python benchmarks/refit.py`` writes ``benchmarks/results/refit.json`` and the table ``refit.md``
beside it, after every part. What is in the file already is not done again.

1. ResNet-18 at 224x224, calibrated on 512 crops of photographs (every fit takes as many of them as it needs): seconds and peak
   memory of fitting all segments of a plan of half the multiply-accumulates, in a process of its own; and of scoring all candidates
   by the default estimator on 16 crops. Weights are random, with the statistics of the crops: time does not depend on them.
2. Few rows: up to thirty merges of two trained networks (tests/tasks.py), each alone, fitted on as many images as give 0.3, 1 and
   3 rows per unknown; the squared error at its exit on fresh images, as a share of the variance, of the weights that were
   installed, of the composed ones, and of a plain ridge regression without held-out images. In how many merges the
   installed weights are worse than the composed ones, and the medians of all three. Photographs are cropped to 8x8: few rows
   are few pixels, and one image of them says little about others. Merges are left out that have more rows in one image.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

import fxmerge
from fxmerge import regression
from fxmerge.calibration import read_calibration
from fxmerge.candidates import Candidate
from fxmerge.estimators import Distortion
from fxmerge.evaluate import evaluate
from fxmerge.graph import META, by_id, clone, graph_meta, module_of, shape_of
from fxmerge.linear import conv_geometry
from fxmerge.passes import RefitPass, RefitResult, RelaxPass
from fxmerge.passes.enumerate_segments import enumerate_segments
from fxmerge.passes.fold import fold_segments
from fxmerge.regression import Regression, Wanted

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tasks import TASKS, photograph_crops, trained
from zoo import NETWORKS, settle

RESULTS = Path(__file__).with_name("results") / "refit.json"
ROWS = (0.3, 1.0, 3.0)
FRESH = 64
CROPS = {"DnCNN": 8}
MERGES = 30


def main() -> None:
    """Run both parts, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["DnCNN", "ResNet-20"], choices=list(TASKS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where records are written")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="folder of trained networks")
    parser.add_argument("--only", choices=["refit", "score"], help="one timing, printed as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.only:
        print(json.dumps(time_refit() if options.only == "refit" else time_score()))
        return
    record: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    parts: dict[str, Callable[[], Any]] = {part: functools.partial(alone, part) for part in ("refit", "score")}
    parts |= {f"few rows, {name}": functools.partial(few_rows, name, options.work) for name in options.tasks}
    for part, measure in parts.items():
        if part not in record:
            record[part] = measure()
            options.results.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            options.results.with_suffix(".md").write_text(table(record))
            print(part, record[part], flush=True)


def alone(part: str) -> Any:
    """One timing in a process of its own, whose peak memory is then its own, too."""
    command = [sys.executable, __file__, "--only", part]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603 - this very file


def resnet18(crops: Tensor) -> fx.GraphModule:
    """Random weights; batch-norm statistics of the crops."""
    model = NETWORKS["resnet18"](size=224, seed=0)
    settle(model, [crops[:32]])
    return clone(fxmerge.capture(model, crops[:2])).eval()


def time_refit() -> dict[str, float]:
    """Fit every merge of a plan of ResNet-18."""
    crops = photograph_crops(512, 224)
    gm = resnet18(crops)
    plan = fxmerge.frontier(gm, crops[:2], runtime="macs").at(0.5)
    data = read_calibration(torch.split(crops, 32), None, gm, ((crops[:2],), {}))
    relaxed = RelaxPass(plan.candidates)(clone(gm)).graph_module
    start = time.perf_counter()
    outcome = RefitPass(gm, data)(relaxed)
    seconds = time.perf_counter() - start
    assert isinstance(outcome, RefitResult)  # noqa: S101 - tells the type checker what the pass returns
    fits = outcome.fits
    return {
        "seconds": seconds,
        "fits": len(fits),
        "fitted": sum(fit.fitted for fit in fits),
        "least rows per unknown": min(fit.rows_per_unknown for fit in fits),
        "images": len(crops),
        "GiB": peak(),
    }


def time_score() -> dict[str, float]:
    """Score every candidate of ResNet-18."""
    crops = photograph_crops(16, 224)
    gm = resnet18(crops)
    candidates = list(dict.fromkeys(site.candidate for site in enumerate_segments(gm).sites))
    data = read_calibration(torch.split(crops, 4), None, gm, ((crops[:2],), {}))
    start = time.perf_counter()
    score = Distortion(data, fit="refit").prepare(gm, candidates)
    for candidate in candidates:
        score(candidate)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "candidates": len(candidates), "images": len(crops), "GiB": peak()}


def peak() -> float:
    """Peak resident memory of this process in GiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**30 if sys.platform == "darwin" else size / 2**20


# --- few rows ---------------------------------------------------------------------------------------------------------


def few_rows(name: str, work: Path) -> dict[str, dict[str, float]]:
    """Of every number of rows per unknown: merges, how many are worse than composed, and median errors."""
    task, model, side = TASKS[name], trained(name, 0, work), CROPS.get(name)
    images, fresh = (data[0][..., :side, :side] for data in (task.train(), task.test()))
    fresh = fresh[:FRESH]
    gm = clone(fxmerge.capture(model, images[:2])).eval()
    sites = enumerate_segments(gm).sites
    merges = [c for c in dict.fromkeys(site.candidate for site in sites) if c.kind == "merge" and not c.norm]
    merges = merges[:: max(1, len(merges) // MERGES)][:MERGES]
    found = {}
    for rows in ROWS:
        errors = [each for each in (compare(gm, candidate, images, fresh, rows) for candidate in merges) if each]
        found[str(rows)] = {
            "merges": len(errors),
            "images": min(error.images for error in errors),
            "worse": sum(error.installed > error.composed * (1 + 1e-9) for error in errors),
            "installed": statistics.median(error.installed for error in errors),
            "composed": statistics.median(error.composed for error in errors),
            "plain ridge": statistics.median(error.plain for error in errors),
        }
    return found


class Errors(NamedTuple):
    """On fresh images, and how many images were fitted and held out."""

    installed: float
    composed: float
    plain: float
    images: int


def compare(gm: fx.GraphModule, candidate: Candidate, images: Tensor, fresh: Tensor, rows: float) -> Errors | None:
    """Errors of the weights that are installed, of the composed ones and of a plain ridge regression.

    None where there are fewer than two images with so many rows, or too few images.
    """
    network = RelaxPass((candidate,))(clone(gm)).graph_module.eval()
    (segment,) = graph_meta(network)["segments"]
    fold_segments(network, check=False)
    node = next(node for node in network.graph.nodes if node.meta.get(META, {}).get("exit") == segment["exit"])
    module: Any = module_of(network, node)
    geometry, nodes = conv_geometry(module), by_id(gm)
    wanted = nodes[candidate.exit]
    unknowns = math.prod(geometry.weight_shape[1:])
    count = round(rows * unknowns / math.prod(shape_of(wanted)[2:]) / 0.8)
    if count < 2 or count > len(images):
        return None
    source = nodes[candidate.entry]

    def pairs(x: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        with torch.no_grad():
            (image,) = gm.graph.find_nodes(op="placeholder")
            return [(evaluate(gm, source, {image: x}), [evaluate(gm, wanted, {image: x})])]

    held_out = max(1, count // 5)
    prior = Wanted(geometry, 0, module.weight.detach(), _bias(module))
    fit, checked = pairs(images[held_out:count]), pairs(images[:held_out])
    installed = Regression(geometry, fit, checked).fit([prior])[0]
    judge = Regression(geometry, fit, pairs(fresh))
    columns = regression._columns(geometry, geometry)
    zero = torch.zeros(geometry.groups, unknowns, geometry.out_channels // geometry.groups)
    # the first is the weakest ridge, towards zero, on all rows; held-out images have no part in it
    _, _, weight, bias = next(iter(judge._system.solutions([0], [zero], columns)))
    return Errors(
        judge.error(*regression._as_columns(geometry, installed.weight, installed.bias), 0, columns),
        judge.error(*regression._as_columns(geometry, prior.weight, prior.bias), 0, columns),
        judge.error(weight, bias, 0, columns),
        count,
    )


def _bias(module: Any) -> Tensor:
    return torch.zeros(len(module.weight)) if module.bias is None else module.bias.detach()


def table(record: dict[str, Any]) -> str:
    """Both parts in Markdown."""
    lines = []
    if refit := record.get("refit"):
        lines += [
            "| ResNet-18, 224x224 | images | seconds | peak memory |",
            "|---|---|---|---|",
            f"| refit of a plan, {refit['fits']} fits, {refit['least rows per unknown']:.1f} rows per unknown at least "
            f"| {refit['images']} | {refit['seconds']:.0f} | {refit['GiB']:.1f} GiB |",
        ]
    if score := record.get("score"):
        lines += [
            f"| scoring {score['candidates']} candidates | {score['images']} | {score['seconds']:.0f} "
            f"| {score['GiB']:.1f} GiB |",
            "",
        ]
    few = {part.removeprefix("few rows, "): found for part, found in record.items() if part.startswith("few rows")}
    if few:
        lines += [
            "| network | rows per unknown | images, at least | merges | worse than composed | installed | composed | plain ridge |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for name, found in few.items():
        for rows, each in found.items():
            lines.append(
                f"| {name} | {rows} | {each['images']} | {each['merges']} | {each['worse']} | {each['installed']:.2f} "
                f"| {each['composed']:.2f} | {each['plain ridge']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

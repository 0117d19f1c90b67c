"""Thousands of random networks through capture, plan, relax, fold, save and export: no output may be wrong.

``python benchmarks/soak.py`` checks 10,000 networks of ``tests/random_networks.py`` in blocks of fifty, and writes a line to
``benchmarks/results/soak.jsonl`` after each block. Started again it goes on where it stopped; blocks that failed are run
again. It prints in how many networks a merge held what, and exits with 1 if a block failed. A failure is a block, which
its kind and seed name, with the smallest network that hypothesis found for it.

Several may run at once, each with kinds of its own: ``python benchmarks/soak.py stride group``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from random_checks import Outcome, explore, summary
from random_networks import KINDS

RESULTS = Path(__file__).with_name("results") / "soak.jsonl"
BLOCK: dict[str | None, int] = {None: 42, "save": 5, "onnx": 3}
"""How many networks of a block are compared alone, are saved too, are exported too."""
FIRST_SEED = 1000
"""The tests have the seeds below."""


def main() -> int:
    """Run the blocks that are missing; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"what to look for: {', '.join(KINDS)}")
    parser.add_argument("--networks", type=int, default=10_000, help="how many in all (default 10000)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the blocks are written")
    options = parser.parse_args()
    unknown = [kind for kind in options.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"unknown kind {unknown[0]!r}; the known ones are {', '.join(KINDS)}")
    torch.set_num_threads(1)
    rounds = -(-options.networks // (sum(BLOCK.values()) * len(KINDS)))
    wanted = [(kind, FIRST_SEED + number) for number in range(rounds) for kind in options.kinds]
    done = read(options.results)
    for kind, seed in wanted:
        if not done.get((kind, seed), {"failure": "not run"})["failure"]:
            continue
        done[kind, seed] = run(kind, seed)
        with options.results.open("a") as file:
            file.write(json.dumps(done[kind, seed]) + "\n")
        print(kind, seed, done[kind, seed]["failure"] or f"{done[kind, seed]['seconds']:.0f} s", flush=True)
    blocks = [done[each] for each in wanted]
    print(table(blocks))
    return int(any(block["failure"] for block in blocks))


def read(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The blocks that were run, by kind and seed; of those that were run again the last."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(block["kind"], block["seed"]): block for block in map(json.loads, lines)}


def run(kind: str, seed: int) -> dict[str, Any]:
    """One block as plain data."""
    start = time.perf_counter()
    outcomes: list[Outcome] = []
    failure = ""
    numbers = itertools.count(100 * (seed * len(KINDS) + list(KINDS).index(kind)))
    try:
        for (extra, networks), number in zip(BLOCK.items(), numbers, strict=False):
            outcomes += explore(kind, networks, number, extra)
    except Exception as error:  # whatever it is, it is the result of the block
        failure = "".join(traceback.format_exception(error)[-8:])
    return {
        "kind": kind,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "counts": summary(outcomes),
        "failure": failure,
    }


def table(blocks: Sequence[dict[str, Any]]) -> str:
    """In how many networks there was what, over all blocks, and how many blocks failed."""
    counts: Counter[str] = Counter()
    for block in blocks:
        counts.update(block["counts"])
    failed = sum(bool(block["failure"]) for block in blocks)
    lines = ["| | networks |", "|---|---|", *(f"| {name} | {count} |" for name, count in counts.items())]
    return "\n".join([*lines, f"| failed blocks | {failed} of {len(blocks)} |"])


if __name__ == "__main__":
    sys.exit(main())

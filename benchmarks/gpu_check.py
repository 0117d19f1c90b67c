"""What works on this machine's GPU, and how well latencies hold there: ``make gpu-check``.

``python benchmarks/gpu_check.py`` prints what ``fxmerge doctor`` finds. Where there is a GPU it then runs
``benchmarks/latency.py`` on every runtime that works on it, and writes one record after every step,
``benchmarks/results/gpu-<device>.json``: device, driver, versions, what the doctor found, and the figures of each runtime.
Without a GPU that is said, and nothing is written.

Runtimes whose figures are in the record already, with the same driver and versions, are not run again (``--again`` does).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fxmerge.doctor import Diagnosis, examine

RESULTS = Path(__file__).with_name("results")
LATENCY = Path(__file__).with_name("latency.py")
SAME = ("device", "capability", "driver", "cuda", "python", "versions")
"""What has to be as it was for figures to be kept."""


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; 1 if the default runtime does not work, or the benchmark fails on one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", metavar="NAME", help="instead of all that work on the GPU")
    parser.add_argument("--again", action="store_true", help="run runtimes that are in the record already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record (default %(default)s)")
    options = parser.parse_args(argv)
    found = examine()
    print(f"{found}\n", flush=True)
    if not found.system["gpus"]:
        print("gpu-check: there is no GPU on this machine: nothing was measured, and no record written")
        return int(not found.healthy)
    runtimes = options.runtimes or [p.name for p in found.proofs if p.state == "works" and found.on_gpu(p)]
    target = options.results / f"gpu-{slug(found.system['gpus'][0]['name'])}.json"
    return int(measure(found, target, runtimes, again=options.again) + (not found.healthy) > 0)


def measure(found: Diagnosis, target: Path, runtimes: list[str], *, again: bool = False) -> int:
    """Run the benchmark on each runtime, and write the record after each; how many of them failed."""
    record = about(found)
    before = json.loads(target.read_text()) if target.exists() else {}
    kept = not again and all(before.get(key) == record[key] for key in SAME)
    if kept:
        record["latency"] = before["latency"]
    else:
        remove_unfinished(target)
    save(target, record)
    for name in runtimes:
        if name in record["latency"]:
            print(f"gpu-check: {name} is in {target.name} already", flush=True)
            continue
        print(f"gpu-check: {LATENCY.name} on {name}", flush=True)
        unfinished = target.with_name(f"{target.stem}.{slug(name)}.json")
        problem = run(name, unfinished)
        if problem is None:
            record["latency"][name] = json.loads(unfinished.read_text())
        else:
            print(f"gpu-check: {name} failed: {problem}", flush=True)
            record["failures"][name] = problem
        save(target, record)
    if not record["failures"]:
        remove_unfinished(target)
    print(f"gpu-check: wrote {target}")
    return len(record["failures"])


def about(found: Diagnosis) -> dict[str, Any]:
    """What the record begins with."""
    system = found.system
    gpu = system["gpus"][0]
    return {
        "device": gpu["name"],
        "capability": gpu["capability"],
        "driver": system["driver"],
        "cuda": system["cuda"],
        "python": system["python"],
        "versions": {"fxmerge": system["fxmerge"], **system["packages"]},
        "doctor": found.to_json(),
        "latency": {},
        "failures": {},
    }


def run(runtime: str, results: Path) -> str | None:
    """The latency benchmark in a process of its own, which goes on from where it was in its results; what went wrong."""
    command = [sys.executable, str(LATENCY), "--runtime", runtime, "--results", str(results)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode == 0 and results.exists():
        return None
    said = done.stderr.strip().splitlines()
    return f"{said[-1] if said else 'no results'} (status {done.returncode})"


def save(target: Path, record: dict[str, Any]) -> None:
    """Replace the record in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(target)


def remove_unfinished(target: Path) -> None:
    """Remove what the benchmark wrote beside the record, runtime by runtime."""
    for path in target.parent.glob(f"{target.stem}.*.*"):
        path.unlink()


def slug(name: str) -> str:
    """A name as part of a file's name: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())

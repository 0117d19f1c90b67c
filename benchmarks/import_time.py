"""What `import fxmerge` costs beyond `import torch`, each in fresh interpreters, by turns.

Run: python benchmarks/import_time.py [repeats]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

__all__ = ["main"]


def _seconds(statement: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)  # noqa: S603
    return time.perf_counter() - begin


def main(repeats: int = 7) -> None:
    """Print the median and the spread of both, and the difference of the medians.

    Args:
        repeats: interpreters per statement; one more of each warms the file cache first.
    """
    statements = ("import torch", "import torch, fxmerge")
    for statement in statements:
        _seconds(statement)
    rounds = [[_seconds(statement) for statement in statements] for _ in range(repeats)]
    medians = []
    for statement, samples in zip(statements, zip(*rounds, strict=True), strict=True):
        medians.append(statistics.median(samples))
        spread = f"{min(samples):.2f} to {max(samples):.2f}"
        print(f"{statement:24} {medians[-1]:6.2f} s   ({spread}, {repeats} runs)")
    print(f"{'fxmerge alone':24} {medians[1] - medians[0]:6.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Make a trained ResNet-20 for handwritten digits faster: 60 % of its latency on ONNX Runtime, with the ONNX file to prove it.

Run it with ``make demo`` or ``python examples/digits/compress.py``; about two minutes on two cores. It captures the network,
measures every layer that a plan could contain, scores the candidates on calibration images (no labels), picks the plan, fine-tunes
the result for two short epochs, merges it and writes ``out/digits``: the saved result and two ONNX files.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from data import accuracy, batches, load
from model import pretrained
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.runtimes.onnxruntime import OnnxRuntime

BATCH = 16
"""Images per run: what is timed is one forward pass of this many digits."""


def main() -> None:
    """Compress, fine-tune, export, and print what happened."""
    options = _options()
    _show_progress()
    torch.manual_seed(0)
    start = time.perf_counter()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()

    original = pretrained()
    images, _ = load("calibration")
    example = images[:BATCH]
    console.print(f"ResNet-20 on handwritten digits; asked for {options.budget:.0%} of its ONNX Runtime latency\n")
    result = fxmerge.compress(
        original,
        example,
        options.budget,
        runtime=OnnxRuntime(threads=1),  # one thread repeats better than two where other programs run as well
        calibration=images[: options.images].chunk(options.images // 32),
    )
    print(result.report)

    before = accuracy(result.model)
    finetune(result.model, options.epochs)
    result.save(out / "result")
    compressed = fxmerge.export(result, out / "compressed.onnx")
    reference = fxmerge.export(fxmerge.capture(original, example), out / "original.onnx", example)

    report = result.report
    table = Table(title=f"\nDigits, batch {BATCH}, {report.runtime['device']}")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("accuracy", f"{accuracy(original):.2%}", f"{accuracy(result.model):.2%}")
    table.add_row("  without fine-tuning", "", f"{before:.2%}")
    table.add_row("  of the ONNX file", f"{onnx_accuracy(reference):.2%}", f"{onnx_accuracy(compressed):.2%}")
    ratio = report.measured / report.original
    table.add_row("latency, measured", f"{report.original:.2f} ms", f"{report.measured:.2f} ms ({ratio:.0%})")
    table.add_row("latency, predicted", "", f"{report.predicted:.2f} ms")
    table.add_row("depth (convolutions)", str(report.before.convolutions), str(report.after.convolutions))
    table.add_row("parameters", f"{report.before.parameters:,}", f"{report.after.parameters:,}")
    console.print(table)
    console.print(f"ONNX files:   {compressed} and {reference}")
    console.print(f"saved result: {out / 'result'} (fxmerge.load reads it; it still trains)")
    console.print(f"{time.perf_counter() - start:.0f} seconds in all")


def finetune(model: nn.Module, epochs: int) -> None:
    """Plain cross-entropy: the compressed network is an ordinary module."""
    if not epochs:
        return
    model.train()
    loader = batches("train", size=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss: Tensor = F.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()


def onnx_accuracy(path: Path) -> float:
    """Accuracy on the test digits, computed by ONNX Runtime from the file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images, labels = load("test")
    name = session.get_inputs()[0].name
    parts: list[Tensor] = []
    for part in images.chunk(20):
        (logits,) = session.run(None, {name: np.ascontiguousarray(part.numpy())})
        parts.append(torch.from_numpy(logits).argmax(1))
    return float((torch.cat(parts) == labels).float().mean())


def _show_progress() -> None:
    """Where output is no terminal, fxmerge reports its progress as log lines."""
    log = logging.getLogger("fxmerge")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.6, help="share of the original's latency (default 0.6)")
    parser.add_argument("--images", type=int, default=160, help="calibration images (default 160)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of fine-tuning on 8,000 digits (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="where files go (default out/digits)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

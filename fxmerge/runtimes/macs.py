"""Multiply-accumulates in place of milliseconds: analytic, the same on every machine, nothing measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ._base import LayerSignature

__all__ = ["Macs"]


class Macs:
    """Counts multiply-accumulates: convolutions of every kind, linear layers, matrix products.

    Additions, norms, activations and pools count as nothing. Layers and networks agree exactly: the sum
    over the convolutions of a network of convolutions is what :meth:`build` reports.
    """

    name: Final = "macs"
    unit: Final[Literal["ms", "MACs"]] = "MACs"
    deterministic: Final = True

    def environment(self) -> dict[str, str]:
        """Nothing but the runtime's name: a count depends on no machine."""
        return {"runtime": self.name}

    def measure(
        self,
        signatures: Sequence[LayerSignature],
        on_result: Callable[[LayerSignature, float], None],
    ) -> None:
        """Count each layer at its input size and batch."""
        for signature in signatures:
            on_result(signature, float(signature.geometry.macs(signature.in_size, signature.batch)))

    def build(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], float]:
        """Count the whole network in one forward pass on the given inputs."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*args, **kwargs)
        # torch counts a multiply-accumulate as two operations
        macs = counter.get_total_flops() / 2
        return lambda: macs

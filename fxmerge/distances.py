"""How far tensors are from those of a reference; gradients flow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["output_distance", "relative_error"]


def output_distance(found: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """Of a network's output, a tensor with one number.

    Two-dimensional outputs are taken for logits: mean over the batch of KL(softmax(reference / T) || softmax(found / T)), in
    nats, times T^2 (Hinton et al. 2015, arXiv 1503.02531, section 2). Others: :func:`relative_error`.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> float(output_distance(logits, logits + 1.0))
        0.0
    """
    if reference.ndim == 2 and reference.shape[1] > 1:
        logs = (found / temperature).log_softmax(1), (reference / temperature).log_softmax(1)
        return F.kl_div(*logs, log_target=True, reduction="batchmean") * temperature**2
    return relative_error(found, reference)


def relative_error(found: Tensor, reference: Tensor) -> Tensor:
    """Squared error over the reference's variance around its mean over the batch, around zero for a batch of one.

    Example:
        >>> float(relative_error(torch.zeros(1, 2, 3), torch.ones(1, 2, 3)))
        1.0
    """
    centred = reference - reference.mean(dim=0) if reference.ndim and reference.shape[0] > 1 else reference
    spread = centred.square().sum().clamp_min(torch.finfo(reference.dtype).tiny)
    return (found - reference).square().sum() / spread

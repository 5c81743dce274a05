"""What a language model's predictions cost against a teacher's and against the text, a few rows of a large vocabulary at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kanformer.training.masking import IGNORED

_NUMBERS = 2**22  # logits that are worked on at a time, in float32


def logit_losses(
    student: Tensor,
    teacher: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    shares: Tensor,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl_weight * KL + ce_weight * CE, KL, CE), sums in nats; a gradient flows into `student` from the first.

    - KL = T^2 * sum over `rows` of KL(teacher || student) = sum_v p(v) (log p(v) - log q(v)), p and q at temperature T.
    - CE = sum over labels of -log q(label) times its share, q at temperature 1.

    The gradient is made at once, row by row, and takes the place of the teacher's logits: `teacher` is overwritten where gradients are wanted. So two
    tensors of logits exist at a time, the student's and the teacher's, whatever the vocabulary. Logarithms are in float32 (float64 for float64 logits).

    Args:
        student, teacher: (..., vocabulary). Without a teacher KL is 0.
        rows: (...) of bool, those of real tokens; the others cost nothing and get no gradient.
        labels: (...), `IGNORED` where nothing is to be predicted. shares: (...).

    Source: Hinton et al. 2015, Distilling the knowledge in a neural network (arXiv 1503.02531), section 2, with its T^2.
    """
    flat = student.detach().reshape(-1, student.shape[-1])
    wanted = None if teacher is None else teacher.detach().reshape(-1, student.shape[-1])
    gradient = None
    if student.requires_grad and torch.is_grad_enabled():
        gradient = wanted if wanted is not None and wanted.dtype == flat.dtype else torch.empty_like(flat)
    kl, ce = (torch.zeros((), dtype=torch.float64, device=flat.device) for _ in range(2))
    keep, labels, shares = rows.reshape(-1), labels.reshape(-1), shares.reshape(-1)
    with torch.no_grad():
        for part in keep.nonzero().squeeze(1).split(max(1, _NUMBERS // flat.shape[-1])):
            slope = None
            if wanted is not None and kl_weight:
                nats, slope = _divergence(flat[part], wanted[part], temperature)
                kl += nats
                slope *= kl_weight
            if ce_weight:
                nats, more = _cross_entropy(flat[part], labels[part], shares[part])
                ce += nats
                more *= ce_weight
                slope = more if slope is None else slope.add_(more)
            if gradient is not None and slope is not None:
                gradient[part] = slope.to(gradient.dtype)
        if gradient is not None:
            gradient.masked_fill_(~keep.unsqueeze(1), 0.0)
    kind = torch.float64 if flat.dtype == torch.float64 else torch.float32
    total = (kl_weight * kl + ce_weight * ce).to(kind)
    if gradient is not None:
        total = _WithGradient.apply(student, total, gradient.view_as(student))
    return total, kl.to(kind), ce.to(kind)  # type: ignore[return-value]


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(T^2 * summed KL, its gradient by the student's logits)."""
    ours, theirs = (F.log_softmax(_wide(logits).div_(temperature), -1) for logits in (student, teacher))
    share = theirs.exp()
    nats = torch.where(share > 0, share * theirs.sub_(ours), 0.0).sum(-1).double().sum()
    return nats * temperature**2, ours.exp_().sub_(share).mul_(temperature)


def _cross_entropy(student: Tensor, labels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    scores, known = F.log_softmax(_wide(student), -1), (labels != IGNORED).unsqueeze(1)
    index, weight = labels.unsqueeze(1).clamp(min=0), torch.where(known, shares.unsqueeze(1).to(scores.dtype), 0.0)
    nats = -(scores.gather(1, index) * weight).double().sum()
    slope = scores.exp_().mul_(weight)
    return nats, slope.scatter_add_(1, index, -weight)


def _wide(logits: Tensor) -> Tensor:
    """A copy in the dtype of the logarithms."""
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient by x is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slopes[0].to(gradient.dtype), None, None

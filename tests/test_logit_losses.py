"""KL and cross-entropy over large vocabularies: the numbers and gradients of the plain formulas, without further copies of the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kanformer.training import logit_losses as module
from kanformer.training.logit_losses import logit_losses
from kanformer.training.masking import IGNORED

VOCABULARY = 11


@pytest.fixture
def case():
    """(student, teacher) logits (3, 5, 11), rows, labels and shares; the last text has two tokens, the rest of it is padding."""
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(3, 5, VOCABULARY, dtype=torch.float64) for _ in range(2))
    rows = torch.ones(3, 5, dtype=torch.bool)
    rows[2, 2:] = False
    labels = torch.randint(VOCABULARY, (3, 5)).masked_fill(~rows, IGNORED)
    labels[:, -1], labels[2, 1] = IGNORED, IGNORED
    return student, teacher, rows, labels, torch.rand(3, 5, dtype=torch.float64)


def plain(student, teacher, rows, labels, shares, kl_weight, ce_weight, temperature):
    """The definitions, token by token, left to autograd."""
    kl = ce = torch.zeros((), dtype=student.dtype)
    for row in rows.nonzero().tolist():
        x, y = student[tuple(row)], teacher[tuple(row)]
        p, q = (y / temperature).softmax(0), (x / temperature).softmax(0)
        kl = kl + temperature**2 * (p * (p / q).log()).sum()
        if labels[tuple(row)] != IGNORED:
            ce = ce + shares[tuple(row)] * F.cross_entropy(x, labels[tuple(row)])
    return kl_weight * kl + ce_weight * ce, kl, ce


@pytest.mark.parametrize("numbers", [1, 3 * VOCABULARY, 2**22])
@pytest.mark.parametrize(("kl_weight", "ce_weight", "temperature"), [(1.0, 0.0, 1.0), (0.7, 0.3, 2.0), (0.0, 1.0, 1.0), (2.0, 0.5, 0.5)])
def test_values_and_gradients_are_those_of_the_definitions_in_chunks_of_any_size(case, numbers, kl_weight, ce_weight, temperature, monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", numbers)
    student, teacher, *rest = case
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    got = logit_losses(mine, teacher.clone(), *rest, kl_weight, ce_weight, temperature)
    wanted = plain(theirs, teacher, *rest, kl_weight, ce_weight, temperature)
    (3 * got[0]).backward()
    (3 * wanted[0]).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(got[0], wanted[0])
    for name, a, b in (("kl", got[1], wanted[1]), ("ce", got[2], wanted[2])):
        if kl_weight if name == "kl" else ce_weight:
            torch.testing.assert_close(a, b)


def test_the_gradient_is_that_of_finite_differences(case):
    student, teacher, *rest = case
    assert torch.autograd.gradcheck(lambda x: logit_losses(x, teacher.clone(), *rest, 0.7, 0.3, 2.0)[0], student.clone().requires_grad_())


def test_equal_predictions_cost_nothing_and_pull_nowhere(case):
    student, _, *rest = case
    mine = student.clone().requires_grad_()
    total, kl, _ = logit_losses(mine, student.clone(), *rest)
    total.backward()
    assert float(kl) == 0 and not mine.grad.any()
    for temperature in (0.5, 3.0):
        assert float(logit_losses(student, student.clone(), *rest, temperature=temperature)[1]) == 0


def test_padding_is_not_looked_at(case):
    student, teacher, rows, *rest = case
    clean = student.clone().requires_grad_()
    dirty = student.masked_fill(~rows.unsqueeze(-1), torch.nan).requires_grad_()
    for logits, other in ((clean, teacher.clone()), (dirty, teacher.masked_fill(~rows.unsqueeze(-1), torch.inf))):
        logit_losses(logits, other, rows, *rest, 1.0, 1.0)[0].backward()
    assert torch.equal(clean.grad, dirty.grad) and not clean.grad[~rows].any()


def test_logits_in_bf16_lose_only_their_own_rounding(case):
    student, teacher, *rest = case
    low, high = student.bfloat16().requires_grad_(), student.bfloat16().double().requires_grad_()
    got = logit_losses(low, teacher.bfloat16(), *rest, 1.0, 1.0)
    wanted = plain(high, teacher.bfloat16().double(), *rest, 1.0, 1.0, 1.0)
    got[0].backward()
    wanted[0].backward()
    assert got[0].dtype == torch.float32
    assert [value.item() for value in got] == pytest.approx([value.item() for value in wanted], rel=1e-5)
    assert (low.grad.double() - high.grad).abs().max() < 2**-8 * high.grad.abs().max()


class _Large(TorchDispatchMode):
    """Counts the results as large as the logits that lie in memory of their own."""

    def __init__(self, known, numbers):
        super().__init__()
        self.found = {tensor.untyped_storage().data_ptr(): tensor for tensor in known}  # kept, so that no address is used twice
        self.numbers = numbers

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.element_size() >= self.numbers * 4:
                self.found[tensor.untyped_storage().data_ptr()] = tensor
        return result


@pytest.mark.parametrize(("kl_weight", "more"), [(1.0, 0), (0.0, 1)])
def test_no_other_tensor_of_the_logits_size_is_made_before_the_backward_pass(kl_weight, more, monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", 2**12)
    student, teacher = torch.randn(2, 40, 2000, requires_grad=True), torch.randn(2, 40, 2000)
    rows, labels = torch.ones(2, 40, dtype=torch.bool), torch.randint(2000, (2, 40))
    with _Large((student, teacher), student.numel()) as large:
        logit_losses(student, teacher if kl_weight else None, rows, labels, torch.ones(2, 40), kl_weight, 1.0)
    assert len(large.found) == 2 + more

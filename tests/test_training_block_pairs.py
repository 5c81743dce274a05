"""What is watched of the original's blocks, and the variance that is left unexplained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kanformer.surgery.finding.sites import Site
from kanformer.surgery.finding.spec import FFNSpec
from kanformer.training.block_pairs import Unexplained, watched_blocks


class Normed(nn.Module):
    """A block that begins with a norm, as conformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)

    def forward(self, x):
        return self.down(self.act(self.up(self.norm(x))))


def test_a_blocks_input_is_what_lies_before_its_norm_and_padding_is_left_out():
    model, x = nn.Sequential(Normed()), torch.randn(2, 3, 6)
    site = Site(model, "0", FFNSpec(name="normed", owner="Normed", up="up", activation="act", down="down", input_norm="norm"))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    with torch.no_grad(), watched_blocks([site], {"attention_mask": mask}) as seen:
        y = model(x)
    assert torch.equal(seen[0][0], x[mask == 1]) and torch.equal(seen[0][1], y[mask == 1])
    seen.clear()
    model(x)
    assert not seen, "the hooks are gone"


def test_unexplained_is_the_error_over_the_variance_about_each_channels_mean_in_any_pieces():
    target = torch.randn(40, 5) * torch.tensor([0.1, 1.0, 10.0, 1.0, 1.0]) + torch.tensor([1e4, 0.0, 3.0, 0.0, -5.0])
    output = target + 0.3 * torch.randn(40, 5)
    wanted = float((output - target).double().square().sum() / (target.double() - target.double().mean(0)).square().sum())
    for pieces in (1, 7, 40):
        found = Unexplained()
        for part in range(0, 40, -(-40 // pieces)):
            rows = slice(part, part + -(-40 // pieces))
            found.add(output[rows], target[rows])
        assert found.fvu == pytest.approx(wanted, rel=1e-9)
    mean = Unexplained()
    mean.add(target.double().mean(0).expand(40, 5), target)
    assert mean.fvu == pytest.approx(1) and math.isnan(Unexplained().fvu)

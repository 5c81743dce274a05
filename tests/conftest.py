"""What every test shares: seeds, hypothesis settings, and files that lie beside the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import register_random, settings

# No test waits for a compiler unless it asks for one (kanformer.ops.use_backend).
os.environ.setdefault("KANFORMER_BACKEND", "eager")

# Small tensors: a second thread gains nothing, and costs several times the time when the cores are busy.
torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# The same examples in every run: a failure here is a failure everywhere. Deadlines only measure the machine.
settings.register_profile("kanformer", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("kanformer")


class _TorchRandom:
    """torch's generator as hypothesis wants it, so that each example starts from the same seed and replays."""

    seed, getstate, setstate = staticmethod(torch.manual_seed), staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps a weak reference only
register_random(_TORCH_RANDOM)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """The folder of data that is not part of the project; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data folder {SHARED_DATA}, which is not part of the project")
    return SHARED_DATA

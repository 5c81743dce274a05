"""The script behind the figures of docs/symbolic.md."""

from __future__ import annotations

import re

from training_cases import python


def test_most_planted_families_are_found():
    done = python("scripts/measure_symbolic.py", "--inputs", "2", "--outputs", "90")
    assert done.returncode == 0 and "180 edges, 22 families" in done.stdout, done.stderr
    assert float(re.findall(r"in the equivalence set: ([\d.]+)", done.stdout)[0]) >= 0.95

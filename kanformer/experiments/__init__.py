"""What grids of runs have in common: intervals over seeds, and one grid per folder."""

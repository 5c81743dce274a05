"""python scripts/calibrate.py --config configs/calibrate_minilm.yaml [--setting value ...]; --help lists the settings."""

import sys

from kanformer.cli import main

if __name__ == "__main__":
    main(["calibrate", *sys.argv[1:]])

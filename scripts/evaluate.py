"""python scripts/evaluate.py --config configs/NAME.yaml [--setting value ...]; --help lists the settings."""

from kanformer.evaluation.run import main

if __name__ == "__main__":
    main()

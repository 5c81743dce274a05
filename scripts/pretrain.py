"""python scripts/pretrain.py --config configs/pretrain_char.yaml [--setting value ...]; --help lists the settings."""

from kanformer.pretraining.grid import main

if __name__ == "__main__":
    main()

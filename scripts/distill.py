"""accelerate launch scripts/distill.py --config configs/NAME.yaml [--setting value ...]; --help lists the settings."""

from kanformer.training.distill import main

if __name__ == "__main__":
    main()

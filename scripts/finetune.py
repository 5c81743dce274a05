"""accelerate launch scripts/finetune.py --config configs/NAME.yaml [--setting value ...]; --help lists the settings."""

from kanformer.training.finetune import main

if __name__ == "__main__":
    main()

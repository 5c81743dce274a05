"""python scripts/study.py --config configs/study_minilm.yaml [--setting value ...]; --help lists the settings."""

from kanformer.study.run import main

if __name__ == "__main__":
    main()

"""python scripts/benchmark.py [--section ffn] [--dtype float32] [--peers] [--out FILE.csv]; --help lists the settings."""

from kanformer.benchmark.run import main

if __name__ == "__main__":
    main()

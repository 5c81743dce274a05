"""python scripts/sweep_architectures.py: patches a tiny model of every model type of transformers and writes docs/architectures.md.

Finished types are kept in a cache, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the factory of tiny models lives with the tests
os.environ["HF_HUB_OFFLINE"] = "1"  # some configs would ask the hub for a backbone
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KANFORMER_BACKEND", "eager")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="A,B", help="these model types; prints their results and writes no table")
    parser.add_argument("--refresh", action="store_true", help="do not use what the cache holds")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "architectures.jsonl", help="JSON lines, one per result (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md", help="the table (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="what one type may take (default: %(default)s)")
    arguments = parser.parse_args()

    from architecture_factory import model_types
    from architecture_sweep import report, sweep

    known = model_types()
    types = arguments.only.split(",") if arguments.only else known
    if unknown := sorted(set(types) - set(known)):
        parser.error(f"transformers knows no model type {', '.join(unknown)}")
    results = sweep(types, arguments.cache, refresh=arguments.refresh, workers=arguments.workers, seconds=arguments.seconds)
    if arguments.only:
        print(*results, sep="\n")
    else:
        arguments.out.write_text(report(results))
        print(f"wrote {arguments.out}")
    print(", ".join(f"{count} {status}" for status, count in Counter(result.status for result in results).most_common()))
    sys.exit(0 if all(result.fine for result in results) else 1)


if __name__ == "__main__":
    main()

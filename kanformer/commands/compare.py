"""`kanformer compare`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kanformer.commands.shared import load, need
from kanformer.training.arguments import option


@dataclass
class CompareArguments:
    """Settings of `kanformer compare`."""

    model: str = option("", "folder or hub id of a patched model")
    json: bool = option(False, "print JSON")


def compare(arguments: CompareArguments) -> None:
    """Prints the comparison as a table or JSON."""
    from kanformer.surgery.compare import compare as count

    need(arguments.model, "model")
    found = count(load(arguments.model))
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)

"""Changes adapters for ever, saying what it is about to do and what is done: ``killed_server.py FOLDER SEED``."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    marked: Any = importlib.import_module("serving.marked")
    from deployfa.errors import InputError
    from deployfa.serving.adapter_store import AdapterStore

    rng = random.Random(int(sys.argv[2]))
    registry = marked.make_registry(AdapterStore(Path(sys.argv[1])), max_resident=2)
    if registry.restore():
        sys.exit("something was damaged")
    number = 100 * int(sys.argv[2])
    while True:
        number += 1
        name = rng.choice(["a", "b", "c", *marked.OWN])
        gone = rng.random() < 0.3
        print("begin", name, -1 if gone else number, flush=True)
        try:
            if gone:
                registry.unload(name)
            else:
                registry.load(name, marked.content(name, number), marked.SUFFIX)
        except InputError as error:
            if not (gone and "no adapter" in str(error)):
                raise
        print("done", name, number, flush=True)


main()

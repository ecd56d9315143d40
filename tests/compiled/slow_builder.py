"""A builder for tests: `python -m compiled.slow_builder SPECS_JSON DIRECTORY` takes its time and notes what it makes."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

CUBIN = bytes(range(256)) * 40


@dataclass(frozen=True)
class SlowSpec:
    """A kernel that takes `seconds`, and is noted in the file `log` with its process when it is begun; `error` ends the builder with it."""

    name: str
    log: str
    seconds: float = 0.0
    error: str = ""
    noise: int = 0
    arch: str = "sm_90a"
    builder: ClassVar[str] = "compiled.slow_builder"

    @property
    def key(self) -> str:
        return f"key-{self.name}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def without_torch() -> None:
    """Let `glu4.compiled.store` be imported without the rest of glu4, whose import takes seconds: for processes of tests only."""
    spec = importlib.util.find_spec("glu4")
    assert spec is not None
    package = ModuleType("glu4")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["glu4"] = package


def main() -> None:
    without_torch()
    from glu4.compiled import store

    for entry in json.loads(Path(sys.argv[1]).read_text()):
        spec = SlowSpec(**entry)
        with Path(spec.log).open("a") as log:
            log.write(f"{spec.name} {os.getpid()}\n")
        time.sleep(spec.seconds)
        print("x" * spec.noise, file=sys.stderr, flush=True)
        if spec.error:
            sys.exit(spec.error)
        store.write(Path(sys.argv[2]), spec, CUBIN, {"entry": spec.name})
        print(spec.name, flush=True)


if __name__ == "__main__":
    main()

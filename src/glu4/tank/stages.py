"""Hopper kernels with a given number of pipeline stages, where the backend's own take as many as fit.

`python -m glu4.tank.stages SPECS_JSON OUTPUT [--ptx]` compiles them with CuTe DSL, in a process of its own; with --ptx it
writes NAME.ptx for the emulator instead of kernels.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from glu4.backends.hopper.config import Config
from glu4.backends.hopper.spec import DecodeSpec, KernelSpec
from glu4.compiled.store import write

__all__ = ["StagesConfig", "StagesSpec", "main"]


@dataclass(frozen=True)
class StagesConfig(Config):
    """A Config with `ring` stages instead of as many as fit; 0 leaves them as they are, and makes the very same kernel."""

    ring: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ring < 0 or self.ring % self.k_groups:
            raise ValueError(f"stages: expected a multiple of the {self.k_groups} k_groups, got {self.ring}")
        most = Config.stages.fget(self)  # type: ignore[attr-defined]
        if self.ring > most:
            taken = f"{self.ring} of {self.stage_bytes} bytes"
            raise ValueError(f"stages: {taken} do not fit in the 232448 bytes of a CTA's shared memory, which hold {most}")

    @property
    def stages(self) -> int:
        return self.ring or Config.stages.fget(self)  # type: ignore[attr-defined]

    @property
    def name(self) -> str:
        own: str = Config.name.fget(self)  # type: ignore[attr-defined]
        return own + (f"d{self.ring}" if self.ring else "")


@dataclass(frozen=True)
class StagesSpec(KernelSpec):
    """A KernelSpec whose configuration says its stages; the dispatch's own specs of that configuration find its kernel."""

    builder: ClassVar[str] = "glu4.tank.stages"

    @classmethod
    def of(cls, config: Config, x: Any, out: Any, dual: bool, nvfp4: bool = False) -> StagesSpec:
        made = KernelSpec.of(config, x, out, dual, nvfp4)
        return cls(made.config, made.x, made.out, made.dual)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> StagesSpec:
        return cls(**{**d, "config": StagesConfig(**d["config"])})


def main() -> None:
    """Compile the specs listed in a JSON file into a directory; one line of progress each on stdout."""
    from cutlass import cute

    from glu4.backends.hopper import build

    documents, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for document in documents:
        spec = StagesSpec.from_dict(document) if "config" in document else DecodeSpec(**document)
        with tempfile.TemporaryDirectory() as scratch:
            if sys.argv[3:] == ["--ptx"]:
                made = cute.compile(*build._arguments(spec), options=f"--keep-ptx --dump-dir={scratch}")
                (target / f"{spec.name}.ptx").write_text(made.artifacts.PTX)
            else:
                write(target, spec, *build.compile_spec(spec, scratch))
        print(spec.name, flush=True)


if __name__ == "__main__":
    main()

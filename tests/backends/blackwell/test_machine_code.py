"""What was compiled: resources, and the instructions in PTX and in machine code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from backends.blackwell import machine_code
from backends.blackwell.kernels import KERNELS, PROCESSORS, Kernels, operands
from backends.blackwell.table import SPECS, table, written
from glu4.backends.blackwell.emulation import Exported
from glu4.backends.blackwell.spec import KernelSpec
from glu4.compiled.cubin import resources
from glu4.verify import full_range_case

if importlib.util.find_spec("cutlass") is None:
    pytest.skip("needs CuTe DSL to compile the Blackwell kernels", allow_module_level=True)

pytestmark = pytest.mark.slow  # CI's longer proofs are where CuTe DSL is
needs_disassembler = pytest.mark.skipif(machine_code.disassembler() is None, reason="needs nvidia-cuda-nvdisasm")


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> Kernels:
    return Kernels(SPECS, compiled)


@pytest.mark.parametrize("name", KERNELS)
def test_resources(kernels: Kernels, name: str) -> None:
    """No spills; shared memory, tensor memory, grid and cluster as the configuration says."""
    spec, (m, n, k) = KERNELS[name]
    kernel, c = kernels[name], spec.config
    registers, stack = resources(kernel.cubin)
    assert stack == 0
    assert registers * c.threads <= 65536
    case = full_range_case(1, m, n, k, linear=not spec.dual)
    launch = kernel.launch(operands(case), torch.zeros(1, m, n, dtype=torch.int16).numpy(), PROCESSORS)
    assert launch["dynamic_smem"] == c.shared_bytes(spec.weights)
    assert tuple(launch["grid"]) == c.grid(m, n, 1, PROCESSORS)
    assert launch.get("cluster", [1, 1, 1]) == [c.ctas, 1, 1]
    allocated = re.search(r"tcgen05\.alloc\S+\s+\[\S+\], (%\w+);", kernel.ptx)
    assert allocated is not None
    assert re.search(rf"mov\.b32\s+{allocated[1]}, {c.columns(spec.weights)};", kernel.ptx)


def count(kernel: Exported, pattern: str) -> int:
    return len(re.findall(pattern, kernel.ptx))


def expected(spec: KernelSpec) -> dict[str, int]:
    """Of instructions, where a loop's stand once.

    A step along K has one copy of each operand's codes and scales, so A is loaded once for both products; the scale copies, and
    the MMAs of its products. Gate first has a second loop, with the same MMAs, in which the scales of A are copied once more.
    Copies also stand ahead of the loop: of early weights, and of the warp that issues the products too, which in turn has them
    in its loops. Pieces of load_width columns are a loop but after gate first, whose activations stay in registers.
    """
    c, weights = spec.config, spec.weights
    blocks, loops, atoms = c.tile_k // 64, 2 if c.gate_first else 1, c.scale_rows // 128
    ahead = max(1, c.stages - 1)  # of one warp for both; the second loop has copies where it begins before the last ones
    loads = 1 + c.early_weights + (1 + (c.gate_first > ahead) if c.warps == "single" else 0)
    stored = (c.tile_n // c.load_width if c.gate_first else 1) if c.store == "tma" else 0
    return {
        "MMAs": weights * blocks * loops,
        "scale copies": (1 + weights * atoms + (2 * (1 + atoms) if c.gate_first else 0)) * blocks,
        "TMA loads": 2 * (1 + weights) * loads,
        "TMA stores": stored,
        "prefetches": (1 + weights) * loads * c.prefetch_scales,
    }


@pytest.mark.parametrize("name", SPECS)
def test_instructions_of_ptx(kernels: Kernels, name: str) -> None:
    kernel, c = kernels[name], SPECS[name].config
    found = {
        "MMAs": count(kernel, rf"tcgen05\.mma\.cta_group::{c.ctas}\.kind::mxf4nvf4\.block_scale\.block16"),
        "scale copies": count(kernel, r"tcgen05\.cp\."),
        "TMA loads": count(kernel, r"cp\.async\.bulk\.tensor\S*mbarrier::complete_tx"),
        "TMA stores": count(kernel, r"cp\.async\.bulk\.tensor\S*bulk_group"),
        "prefetches": count(kernel, r"cp\.async\.bulk\.prefetch\.tensor"),
    }
    wanted = expected(SPECS[name])
    assert found == wanted
    assert count(kernel, r"tcgen05\.mma") == wanted["MMAs"]
    used = {keep: count(kernel, rf"collector::a::{keep}\b") for keep in ("fill", "lastuse", "discard")}
    alternate = c.tile_k // 64 if c.collector else 0
    assert used == {"fill": alternate, "lastuse": alternate, "discard": wanted["MMAs"] - 2 * alternate}
    assert (count(kernel, r"griddepcontrol\.wait") > 0) == c.pdl


MMA = re.compile(r"tcgen05\.mma\S*\.collector::a::(\w+)\s+\[[^]]+\], (%\w+), %\w+, %\w+, \[([^]]+)\]")


def kept(ptx: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Descriptor of A and address of its scales of each `fill`, and of the MMA after it, which must be a `lastuse`.

    Between the two there is no label and nothing is written to these registers.
    """
    fills, uses = [], []
    lines = iter(ptx.splitlines())
    for line in lines:
        found = MMA.search(line)
        if found is None or found[1] != "fill":
            continue
        fills.append((found[2], found[3]))
        for between in lines:
            assert not between.startswith("$L")
            if after := MMA.search(between):
                assert after[1] == "lastuse"
                uses.append((after[2], after[3]))
                break
            assert not re.match(rf"\s*(@\S+\s+)?\S+\s+({re.escape(found[2])}|{re.escape(found[3])})\b", between)
    return fills, uses


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.config.collector])
def test_what_stays_in_the_collector_is_the_a_that_is_used_next(kernels: Kernels, name: str) -> None:
    fills, uses = kept(kernels[name].ptx)
    assert len(fills) == SPECS[name].config.tile_k // 64
    assert fills == uses
    line = re.search(MMA.pattern.replace(r"(\w+)", "lastuse", 1), kernels[name].ptx)
    assert line is not None
    other = kept(kernels[name].ptx.replace(line[0], line[0].replace(line[1], "%rd0"), 1))  # another A for up's product
    assert other[0] != other[1]


@needs_disassembler
@pytest.mark.parametrize("name", SPECS)
def test_instructions_of_machine_code(kernels: Kernels, name: str) -> None:
    found, wanted = machine_code.counts(kernels[name].cubin), expected(SPECS[name])
    assert {what: found[what] for what in wanted} == wanted
    assert (found["spills"], found["other MMAs"]) == (0, 0)
    assert found["TMEM loads"] > 0


@needs_disassembler
def test_the_table_of_the_documentation(kernels: Kernels) -> None:
    assert written() == table(kernels)

"""`custom_kernel` of the exported group submission, here as the module it is made from, with a libcuda that records."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch

from backends.blackwell.grouped import recording
from fake_hopper import memory
from glu4 import reference
from glu4.backends.blackwell import grouped_contest_kernel
from glu4.backends.blackwell.grouped_config import GroupConfig
from glu4.backends.blackwell.grouped_contest_kernel import Spec, custom_kernel
from glu4.backends.blackwell.grouped_launch import grouped_sizes
from glu4.emulator.capture import CapturedLaunch
from glu4.emulator.tensor_map import TensorMap, decode
from glu4.nvfp4 import NVFP4Tensor
from glu4.scale_layout import SwizzledLayout
from glu4.verify.contest import GROUP_BENCHMARKS, GroupShape, full_range_group
from glu4.verify.recorder import Recorder

SHAPE = GroupShape(((96, 128, 256), (130, 264, 512), (1, 8, 32 * 3)))
TABLED = GroupShape(((40, 72, 256), (8, 136, 512)))
CONFIG = GroupConfig(2, ctas=2, tile_m=256, tile_n=64, stages=2)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Compiling writes down what is compiled."""

    def compile_grouped(spec: Spec, directory: str) -> tuple[bytes, str, dict[str, Any]]:
        sizes = grouped_sizes(spec.config)
        listed = ",".join(f".param .align {64 if s == 128 else 4} .b8 p{i}[{s}]" for i, s in enumerate(sizes))
        ptx = f"// {spec.config}\n.version 8.8\n.target sm_100a\n.address_size 64\n.visible .entry f({listed})\n{{ ret; }}"
        cubin = repr(spec.config).encode()
        recorder.remember(cubin, ptx)
        threads = spec.config.mma.threads
        return cubin, ptx, {"entry": "f", "params": sizes, "threads": threads, "shared_bytes": 1000, "pdl": spec.config.pdl}

    with recording() as recorder:
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        monkeypatch.setattr(grouped_contest_kernel, "compile_grouped", compile_grouped)
        monkeypatch.setitem(grouped_contest_kernel.TABLE, tuple((*size, 1) for size in TABLED.sizes), CONFIG)
        forget()
        yield recorder
        forget()


def forget() -> None:
    for remembered in (grouped_contest_kernel._kernel, grouped_contest_kernel._ones, grouped_contest_kernel._plan):
        remembered.cache_clear()


def matrix(codes: TensorMap, scales: TensorMap, rows: int, k: int) -> NVFP4Tensor:
    """The operand that two maps cover, `[rows, k]`."""
    layout = SwizzledLayout(rows, k // 16)
    atoms = layout.storage_shape[:2]
    assert (codes.element_type, codes.global_shape, codes.global_strides) == ("16u4_align8b", (k, rows), (k // 2,))
    assert (scales.element_type, scales.global_shape) == ("u16", (256, atoms[1], atoms[0]))
    assert scales.global_strides == (512, 512 * atoms[1])
    values = memory(codes.address, (rows, k // 2), (k // 2, 1), torch.uint8)
    held = memory(scales.address, (prod(layout.storage_shape),), (1,), torch.uint8).view(layout.storage_shape)
    return NVFP4Tensor(values.clone(), layout.load(held.view(torch.float8_e4m3fn)).clone(), torch.ones(()))


def compute(launch: CapturedLaunch, groups: int) -> None:
    """What the kernel does with these parameters."""
    maps = [decode(p) for p in launch.params[2 : 2 + 4 * groups]]
    rest = launch.params[6 + 4 * groups :]
    words = [int.from_bytes(p, "little") for p in rest]
    outs, strides, numbers, ones = words[:groups], words[groups : 2 * groups], words[2 * groups : -2], words[-2:]
    for g in range(groups):
        m, n, k = numbers[3 * g : 3 * g + 3]
        b, a = matrix(*maps[4 * g : 4 * g + 2], n, k), matrix(*maps[4 * g + 2 : 4 * g + 4], m, k)
        scale = prod(float(memory(address + 4 * g, (1,), (1,), torch.float32)) for address in ones)
        product = a.decode(torch.float64) @ b.decode(torch.float64).mT * scale
        memory(outs[g], (m, n), (strides[g], 1), torch.float16).copy_(reference.round_once(product, torch.float16))


def right(result: list[torch.Tensor], data: Any) -> bool:
    return all(
        torch.equal(c.permute(2, 0, 1)[0], reference.linear(a[0], b[0], out_dtype=torch.float16))
        for c, (a, b, _) in zip(result, data.groups, strict=True)
    )


@pytest.mark.parametrize("shape", [SHAPE, TABLED], ids=str)
def test_it_computes_the_problem(cuda: Recorder, shape: GroupShape) -> None:
    data = full_range_group(shape, 1)
    given = data.as_tuple()
    result = custom_kernel(given)
    assert all(r is c for r, (_, _, c) in zip(result, given[0], strict=True))
    ((ptx, launch),) = cuda.launches
    compute(launch, len(shape.sizes))
    assert right(result, data)
    config = CONFIG if shape is TABLED else GroupConfig(3)
    assert ptx.startswith(f"// {config}\n")
    assert (launch.grid, launch.cluster) == (config.grid(shape.sizes, 148), (2, 1, 1) if shape is TABLED else None)


def test_sizes_may_be_lists(cuda: Recorder) -> None:
    data = full_range_group(TABLED, 1)
    abc, scales, permuted, sizes = data.as_tuple()
    result = custom_kernel([abc, scales, permuted, [list(size) for size in sizes]])
    compute(cuda.launches[0][1], 2)
    assert right(result, data)


def test_nothing_is_copied_and_only_the_first_call_of_its_sizes_prepares(
    cuda: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call has other operands at other addresses, and makes one call of libcuda."""
    first, second = full_range_group(SHAPE, 1), full_range_group(SHAPE, 2)
    custom_kernel(first.as_tuple())
    calls: list[str] = []
    for name in ("cuTensorMapEncodeTiled", "cuLibraryLoadData", "cuKernelSetAttribute"):
        monkeypatch.setattr(getattr(cuda, name), "_function", lambda *_, n=name: calls.append(n) or 1)
    given = second.as_tuple()
    result = custom_kernel(given)
    assert calls == []
    maps = [decode(p) for p in cuda.launches[1][1].params if len(p) == 128]
    wanted = [t.data_ptr() for (a, b, _), (sfa, sfb) in zip(given[0], given[2], strict=True) for t in (b, sfb, a, sfa)]
    assert [m.address for m in maps] == wanted
    compute(cuda.launches[1][1], 3)
    assert right(result, second)


def test_another_call_does_not_see_the_one_before(cuda: Recorder) -> None:
    for seed in (1, 2, 1):
        data = full_range_group(SHAPE, seed)
        given = data.as_tuple()  # whose memory the launch names
        result = custom_kernel(given)
        compute(cuda.launches[-1][1], 3)
        assert right(result, data)


def test_sizes_that_are_refused(cuda: Recorder) -> None:
    abc, scales, permuted, sizes = full_range_group(TABLED, 1).as_tuple()
    for wrong in ([(40, 72, 256, 2), sizes[1]], [(40, 72, 264, 1), sizes[1]]):
        with pytest.raises(ValueError, match="problem sizes: expected K a multiple of 32, and L 1, of every group, got"):
            custom_kernel((abc, scales, permuted, wrong))
    assert cuda.launches == []


def test_host_time(cuda: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 20 us from call to cuLaunchKernelEx, which only counts, for eight groups; the least of many, since others share
    this machine."""
    sizes = tuple((m, 8, 32) for m, _, _ in GROUP_BENCHMARKS[0].sizes)
    blank = [
        NVFP4Tensor(
            torch.zeros((1, 248, 16), dtype=torch.uint8), torch.ones((1, 248, 2)).to(torch.float8_e4m3fn), torch.ones(())
        )
    ]
    views, scales = blank[0].codes.permute(1, 2, 0), blank[0].block_scale
    given = (
        [(views.clone(), views.clone(), torch.zeros((m, 8, 1), dtype=torch.float16)) for m, _, _ in sizes],
        [], [(scales.clone(), scales.clone()) for _ in sizes], [(*size, 1) for size in sizes],
    )  # fmt: skip
    monkeypatch.setattr(cuda.cuLaunchKernelEx, "_function", lambda *_: 0)
    custom_kernel(given)
    took = []
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(30):
            custom_kernel(given)
        took.append((time.perf_counter() - start) / 30)
    assert min(took) < 20e-6, f"{min(took) * 1e6:.1f} us"


def test_words_of_the_launch(cuda: Recorder) -> None:
    custom_kernel(full_range_group(TABLED, 1).as_tuple())
    launch = cuda.launches[0][1]
    assert [struct.unpack("=i", p)[0] for p in launch.params[-8:-2]] == [40, 72, 256, 8, 136, 512]
    assert launch.block == (192, 1, 1)

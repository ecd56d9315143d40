"""`glu4.quantize` on the CPU and as tracers see it; the kernel's bits are proven in backends/tokens/test_quantize_tokens.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import glu4
from glu4 import NVFP4Tensor, nvfp4, quantizer
from glu4.nvfp4 import Layout


def same(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    scales = (t.block_scale.view(torch.uint8) for t in (a, b))
    strides = a.codes.stride() == b.codes.stride()
    return strides and torch.equal(a.codes, b.codes) and torch.equal(*scales) and torch.equal(a.global_scale, b.global_scale)


@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 3), st.integers(0, 5), st.integers(1, 5).map(lambda n: 16 * n)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    scale=st.sampled_from([None, 0.01, torch.tensor(0.02)]),
    options=st.fixed_dictionaries(
        {
            "method": st.sampled_from(["nearest", "four_over_six"]),
            "layout": st.sampled_from(["linear", "swizzled"]),
            "nonfinite": st.sampled_from(["error", "propagate"]),
        }
    ),
    backend=st.sampled_from([None, "portable", "hopper"]),
)
def test_it_is_the_specification_on_a_cpu(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, scale: Any, options: dict[str, Any], backend: str | None
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert same(glu4.quantize(x, scale, **options, backend=backend), nvfp4.quantize(x, scale, **options))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(2, 16), {"backend": "cuda"}, ValueError, "backend: expected one of hopper, blackwell, portable or None"),
        (torch.ones(2, 16), {"layout": "tiled"}, ValueError, "layout: expected one of linear, swizzled, got 'tiled'"),
        (torch.ones(2, 20), {}, ValueError, r"K a positive multiple of 16, got shape \[2, 20\]"),
        ([1.0], {}, TypeError, "x: expected a torch.Tensor, got list"),
        (torch.full((2, 16), torch.nan), {}, ValueError, 'x: holds NaN or infinity, .* nonfinite="propagate"'),
        (torch.ones(3, 2, 16), {"global_scale": torch.tensor([1.0, -2.0, 0.0])}, ValueError, "multipliers, got -2.0"),
    ],
)
def test_refusals(x: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        glu4.quantize(x, **options)


def test_no_gradient_flows_back() -> None:
    x = torch.randn(2, 32, requires_grad=True)
    assert same(glu4.quantize(x, 0.1), nvfp4.quantize(x, 0.1))
    assert not glu4.quantize(x).global_scale.requires_grad


# ---- as tracers see it ----


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
@pytest.mark.parametrize("k", [64, 48])
def test_the_operator(layout: Layout, k: int) -> None:
    """What a graph of a GPU holds: the same bits, whatever lay there, and torch's own checks of it."""
    x = torch.randn(2, 5, k, generator=torch.Generator().manual_seed(k)).half()
    x[1, 3, 7] = torch.nan
    g = torch.tensor([0.3, 0.01])
    codes, scales = quantizer._empty(x, layout)
    quantizer._operator(codes.fill_(0x5A), scales.fill_(0x5A), x, g)
    made = nvfp4._unchecked(codes, scales.view(torch.float8_e4m3fn), g)
    assert same(made, nvfp4.quantize(x, g, layout=layout, nonfinite="propagate"))
    results = torch.library.opcheck(torch.ops.glu4.quantize, (codes, scales, x, g))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_a_graph_of_a_gpu_holds_one_operator(layout: Layout) -> None:
    """Traced without one: what is seen depends on no kernel."""
    with FakeTensorMode():
        x, g = torch.empty((3, 5, 80), dtype=torch.bfloat16, device="cuda"), torch.empty((3,), device="cuda")

        def parts(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            made = glu4.quantize(x, g, layout=layout, nonfinite="propagate")
            assert made.shape == (3, 5, 80)
            assert made.is_swizzled == (layout == "swizzled")
            assert made.has_aligned_rows == (layout == "swizzled")
            return made.codes, made.block_scale

        graph = torch.fx.experimental.proxy_tensor.make_fx(parts)(x, g)
    called = [node.target for node in graph.graph.nodes if "glu4" in str(node.target)]
    assert called == [torch.ops.glu4.quantize.default]
    floats = [node for node in graph.graph.nodes if "isfinite" in str(node.target)]
    assert floats == [], "torch quantises nothing"


def test_compiled_on_a_cpu() -> None:
    x = torch.randn(7, 64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        made = glu4.quantize(x, 0.02, nonfinite="propagate")
        return made.codes, made.block_scale.view(torch.uint8)

    expected = nvfp4.quantize(x, 0.02)
    found = parts(x)
    assert torch.equal(found[0], expected.codes)
    assert torch.equal(found[1], expected.block_scale.view(torch.uint8))

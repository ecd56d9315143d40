"""The limits on the device are the checker's own, and the guards of outputs see a write beside them."""

from __future__ import annotations

import pytest
import torch

from glu4.verify.cases import full_range_case
from glu4.verify.metrics import measure
from gpu.harness import FORMATS, OUT_LAYOUTS, PORTABLE, X_LAYOUTS, Call, Oracle, laid_out, no_hopper, output_for
from gpu.harness import measure as measured_here


@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 1.002, 1.05])
def test_the_same_verdict_as_the_checker(x_format: str, scale: float) -> None:
    for seed in range(4):
        case = full_range_case(seed, 45, 56, 336, x_format=x_format, bias=True, linear=seed == 3)
        output = Call(PORTABLE, case)()
        output[1:, seed:] *= scale
        oracle = Oracle(PORTABLE, case)
        theirs, ours = measure(case, output), measured_here(oracle.terms, output)
        assert torch.equal(theirs.outside, ours.outside)
        assert torch.equal(theirs.inexact, ours.inexact)
        assert ours.norm_ratios == pytest.approx(theirs.norm_ratios, rel=1e-9)
        assert theirs.agrees == ours.agrees == (scale == 1.0)
        assert (oracle.faults(output) is None) == theirs.agrees


def test_nan_and_infinity_are_faults() -> None:
    case = full_range_case(1, 20, 24, 48)
    oracle = Oracle(PORTABLE, case)
    for value in (float("nan"), float("inf")):
        output = Call(PORTABLE, case)()
        output[7, 5] = value
        assert "1 of 480 elements cannot be right, first [[7, 5]]" in str(oracle.faults(output))
        assert oracle.faults(output[8:], start=8) is None


@pytest.mark.parametrize("layout", OUT_LAYOUTS[1:])
def test_a_write_beside_the_output_is_seen(layout: str) -> None:
    for step in (-1, 1):
        out, untouched = output_for(layout, 5, 7, torch.float16, "cpu")
        assert out is not None
        assert out.shape == (5, 7)
        assert bool(out.isnan().all())
        out.fill_(1.0)
        assert untouched()
        last = out.storage_offset() + sum((s - 1) * t for s, t in zip(out.shape, out.stride(), strict=True))
        out.as_strided((1,), (1,), last + 1 if step > 0 else out.storage_offset() - 1).fill_(1.0)
        assert not untouched()


def test_layouts_keep_the_tokens() -> None:
    for m in (5, 6):
        x = torch.randn(m, 32).half()
        for layout in X_LAYOUTS:
            assert torch.equal(laid_out(x, layout).reshape(m, 32), x)


def test_the_reason_without_a_hopper_gpu() -> None:
    if not torch.cuda.is_available():
        assert no_hopper() == "needs a CUDA device"

"""What the kernels touch, and that their results are the same bits: from run to run, alone and in a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from glu4.verify.case import Case
from glu4.verify.cases import exact_sum_case, full_range_case
from gpu import proofs
from gpu.harness import FORMATS, Call, Target


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
@pytest.mark.parametrize("x_format", FORMATS)
def test_outputs_are_written_whole_and_nothing_else_is(target: Target, x_format: str, linear: bool) -> None:
    for config in target.configs:
        proofs.writes_all_and_no_more(target, config, x_format, linear)


def other_work(target: Target) -> Callable[[], object]:
    """Queues products on another stream, more than a call takes."""
    if target.device == "cpu":
        return lambda: None
    stream, a = torch.cuda.Stream(), torch.randn(1536, 1536, device="cuda")
    result = torch.empty_like(a)

    def queue() -> None:
        with torch.cuda.stream(stream):
            for _ in range(2):
                torch.mm(a, a, out=result)

    torch.cuda.synchronize()
    return queue


@pytest.mark.parametrize("x_format", FORMATS)
def test_the_same_bits_fifty_times_beside_other_work(target: Target, x_format: str) -> None:
    case = full_range_case(4, 200, 264, 2064, x_format=x_format) if target.full else full_range_case(4, 20, 40, 80)
    for config in (*target.configs, None):
        proofs.same_bits_every_time(target, config, case, 50 if target.full else 3, other_work(target))


def bits_case(target: Target, x_format: str, linear: bool) -> Case:
    """A case whose bits show the order of additions; on the CPU, whose order is its BLAS's own, one that any order gives."""
    if target.full:
        return full_range_case(5, 300, 264, 2064, x_format=x_format, linear=linear)
    return exact_sum_case(5, 70, 72, 208, x_format=x_format, linear=linear)


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
@pytest.mark.parametrize("x_format", FORMATS)
def test_a_row_is_the_same_alone_and_in_a_batch(target: Target, x_format: str, linear: bool) -> None:
    case = bits_case(target, x_format, linear)
    for config in target.configs:
        proofs.rows_do_not_depend_on_m(target, config, case)
        proofs.columns_do_not_depend_on_n(target, config, case)


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
@pytest.mark.parametrize("x_format", FORMATS)
def test_configurations_that_add_in_one_order_agree(hopper: Target, x_format: str, linear: bool) -> None:
    call = Call(hopper, bits_case(hopper, x_format, linear))
    proofs.configs_of_one_order_agree([c for c in hopper.configs if c is not None], lambda config: call(config=config))

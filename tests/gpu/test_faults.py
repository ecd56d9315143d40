"""Planted faults: every proof fails on a backend that has the fault it is for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glu4 import SILU, Activation, NVFP4Tensor
from glu4.backends import portable
from glu4.backends.hopper import launch
from glu4.backends.hopper.config import SHIPPED, Config
from glu4.backends.hopper.pack import unpack_gated, unpack_matrix
from glu4.problem import Problem
from glu4.verify.cases import exact_sum_case, full_range_case
from gpu import proofs
from gpu.harness import PORTABLE, Target, rows

RIGHT = portable.dense
COUNTER = itertools.count()

Operand = Tensor | NVFP4Tensor
Dense = Callable[..., None]


def without_the_last_block(out: Tensor, x: Operand, gate: NVFP4Tensor, *rest: object) -> None:
    if gate.k > 16:
        keep = gate.k - 16

        def cut(w: object) -> object:
            if isinstance(w, NVFP4Tensor):
                return NVFP4Tensor(w.codes[..., : keep // 2], w.linear_block_scale()[..., : keep // 16], w.global_scale)
            return w[..., :keep] if isinstance(w, Tensor) and w.shape[-1] == gate.k and w.ndim > 1 else w

        RIGHT(out, *(cut(a) for a in (x, gate, *rest)))
    else:
        RIGHT(out, x, gate, *rest)


def without_the_last_row_of_odd_m(out: Tensor, x: Operand, *rest: object) -> None:
    m = out.shape[0] // 2 * 2 if out.shape[0] > 1 else 1
    RIGHT(out[:m], rows(x, 0, m), *rest)


def past_the_last_column(out: Tensor, *rest: object) -> None:
    RIGHT(out, *rest)
    end = out.storage_offset() + out.shape[0] * out.stride(0)
    if end < out.untyped_storage().nbytes() // 2:
        out.as_strided((1,), (1,), end).fill_(1.0)


def reading_beside_the_tokens(out: Tensor, x: Operand, *rest: object) -> None:
    RIGHT(out, x, *rest)
    if isinstance(x, Tensor) and x.stride(0) > x.shape[1]:
        out += x.as_strided((x.shape[0], 1), (x.stride(0), 1), x.storage_offset() + x.shape[1]) * 0


def scaled_by_one_thousandth(out: Tensor, *rest: object) -> None:
    RIGHT(out, *rest)
    out *= 1.001


def other_bits_each_time(out: Tensor, *rest: object) -> None:
    RIGHT(out, *rest)
    out.view(torch.int16)[0, 0] += next(COUNTER) % 2


def other_bits_in_a_batch(out: Tensor, *rest: object) -> None:
    RIGHT(out, *rest)
    if out.shape[0] > 8:
        out.view(torch.int16)[3, 0] += 1


def other_bits_in_wide_outputs(out: Tensor, *rest: object) -> None:
    RIGHT(out, *rest)
    if out.shape[1] > 64:
        out.view(torch.int16)[:, 8] += 1


def scales_to_240(out: Tensor, x: Operand, *rest: object) -> None:
    def cut(w: object) -> object:
        if isinstance(w, NVFP4Tensor):
            return replace(w, block_scale=w.block_scale.float().clamp(max=240.0).to(torch.float8_e4m3fn))
        return w

    RIGHT(out, x, *(cut(w) for w in rest))


def without_biases(out: Tensor, x: Operand, gate: NVFP4Tensor, up: NVFP4Tensor | None, *rest: object) -> None:
    RIGHT(out, x, gate, up, None, None, rest[2])


def always_silu(out: Tensor, x: Operand, gate: NVFP4Tensor, up: NVFP4Tensor | None, *rest: object) -> None:
    kind = rest[2]
    assert isinstance(kind, Activation)
    RIGHT(out, x, gate, up, rest[0], rest[1], SILU if kind.kind != "identity" else kind)


def global_scales_without_subnormals(out: Tensor, x: Operand, *rest: object) -> None:
    def flushed(w: object) -> object:
        if isinstance(w, NVFP4Tensor):
            return replace(w, global_scale=w.global_scale.clamp(min=2.0**-126))
        return w

    RIGHT(out, flushed(x), *(flushed(w) for w in rest))


def _sizes() -> None:
    proofs.right_for_sizes(PORTABLE, "float16", 24, (48, 80, 16, 112, 144), (3, 9))


def _exact(x_format: str = "bfloat16") -> Callable[[], None]:
    return lambda: proofs.exact_for_every_m(PORTABLE, (None,), x_format, False, range(1, 20), 208)


FAULTS: list[tuple[Dense, Callable[[], None]]] = [
    (without_the_last_block, _sizes),
    (without_the_last_block, _exact()),
    (without_the_last_block, lambda: proofs.decodes_every_weight(PORTABLE, (None,), "float16")),
    (without_the_last_row_of_odd_m, lambda: proofs.writes_all_and_no_more(PORTABLE, None, "bfloat16", False)),
    (without_the_last_row_of_odd_m, _exact("nvfp4")),
    (past_the_last_column, lambda: proofs.writes_all_and_no_more(PORTABLE, None, "nvfp4", True)),
    (past_the_last_column, lambda: proofs.right_in_random_problems(PORTABLE, 0, 40)),
    (reading_beside_the_tokens, lambda: proofs.writes_all_and_no_more(PORTABLE, None, "float16", False)),
    (reading_beside_the_tokens, lambda: proofs.right_in_random_problems(PORTABLE, 0, 40)),
    (scaled_by_one_thousandth, _sizes),
    (scaled_by_one_thousandth, lambda: proofs.right_in_random_problems(PORTABLE, 0, 10)),
    (other_bits_each_time, lambda: proofs.same_bits_every_time(PORTABLE, None, full_range_case(1, 9, 24, 48), 3, lambda: None)),
    (other_bits_in_a_batch, lambda: proofs.rows_do_not_depend_on_m(PORTABLE, None, exact_sum_case(5, 70, 72, 208))),
    (other_bits_in_wide_outputs, lambda: proofs.columns_do_not_depend_on_n(PORTABLE, None, exact_sum_case(5, 70, 72, 208))),
    (scales_to_240, lambda: proofs.decodes_every_weight(PORTABLE, (None,), "float16")),
    (without_biases, _sizes),
    (always_silu, _sizes),
    (global_scales_without_subnormals, lambda: proofs.right_with_extreme_scales(PORTABLE, "float16", False)),
    (global_scales_without_subnormals, lambda: proofs.right_with_extreme_scales(PORTABLE, "nvfp4", False)),
]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[Dense], None]:
    return lambda fault: monkeypatch.setattr(portable, "dense", fault)


@pytest.mark.parametrize(("fault", "proof"), FAULTS, ids=[f"{i}-{f.__name__}" for i, (f, _) in enumerate(FAULTS)])
def test_a_planted_fault_fails_its_proof(faulty: Callable[[Dense], None], fault: Dense, proof: Callable[[], None]) -> None:
    proof()  # right before
    faulty(fault)
    with pytest.raises(AssertionError):
        proof()


def test_configurations_of_one_order_with_other_bits_are_seen() -> None:
    one = torch.ones(4, dtype=torch.float16)
    of_order = {proofs.sum_order(c) for c in SHIPPED}
    bits = {order: one + i for i, order in enumerate(of_order)}
    proofs.configs_of_one_order_agree(SHIPPED, lambda config: bits[proofs.sum_order(config)])
    same = [c for c in SHIPPED if sum(proofs.sum_order(c) == proofs.sum_order(d) for d in SHIPPED) > 1]
    assert len(same) > 1

    def other(config: Config) -> Tensor:
        return one + (config == same[-1])

    with pytest.raises(AssertionError, match="add in one order and give different bits"):
        proofs.configs_of_one_order_agree(SHIPPED, other)


# ---- the launches with a configuration, which here unpack the weights and compute on the CPU ----

LAUNCHED = Target("hopper", "cpu", SHIPPED, full=False)


def launched_on_the_cpu(wrong: Config | None = None) -> Dense:
    """In place of `launch.dense`; `wrong` gives other bits."""

    def dense(
        out: Tensor,
        x: Operand,
        packed: Tensor,
        scales: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        activation: Activation,
        problem: Problem,
        config: Config | None = None,
    ) -> None:
        assert config in SHIPPED
        if problem.operation == "linear":
            RIGHT(out, x, unpack_matrix(packed, problem.n, problem.k, scales[0]), None, biases[0], None, activation)
        else:
            RIGHT(out, x, *unpack_gated(packed, problem.n, problem.k, *scales), *biases, activation)
        if config == wrong:
            out.view(torch.int16)[-1, -1] += 1

    return dense


def _of_every_configuration(proof: Callable[..., None], *arguments: object) -> Callable[[], None]:
    def run() -> None:
        for config in LAUNCHED.configs:
            proof(LAUNCHED, config, *arguments)

    return run


LAUNCHES: dict[str, Callable[[], None]] = {
    "one hot": lambda: proofs.decodes_every_weight(LAUNCHED, SHIPPED, "float16"),
    "exact sums": lambda: proofs.exact_for_every_m(LAUNCHED, SHIPPED, "bfloat16", False, (1, 9), 80),
    "exact sums, linear": lambda: proofs.exact_for_every_m(LAUNCHED, SHIPPED, "nvfp4", True, (1, 9), 80),
    "memory": _of_every_configuration(proofs.writes_all_and_no_more, "float16", True),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_one_wrong_configuration_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(launch, "dense", launched_on_the_cpu())
    LAUNCHES[name]()
    monkeypatch.setattr(launch, "dense", launched_on_the_cpu(SHIPPED[-2]))
    with pytest.raises(AssertionError, match=re.escape(str(SHIPPED[-2]))):
        LAUNCHES[name]()

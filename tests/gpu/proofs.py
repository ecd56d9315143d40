"""What must hold of a backend, each as a function that raises AssertionError where it does not. `test_faults` plants faults and
sees them fail; the other files here run them on a target."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from glu4 import IDENTITY, SILU, NVFP4Tensor, clamped_silu, swiglu_oai
from glu4.backends.hopper.config import Config
from glu4.verify.case import Case
from glu4.verify.cases import exact_sum_case, full_range_case, one_hot_case
from gpu.harness import (
    FORMATS,
    FORMS,
    OUT,
    OUT_LAYOUTS,
    X_LAYOUTS,
    Call,
    Operand,
    Oracle,
    Target,
    assert_checked,
    guarded,
    laid_out,
    output_for,
    rows,
    same_bits,
    with_tokens,
)

Configs = Sequence[Config | None]

ACTIVATIONS = (SILU, clamped_silu(2.5), clamped_silu(10.0), swiglu_oai(), IDENTITY)


# ---- values ----


def right_for_every_m(target: Target, case: Case, ms: Iterable[int]) -> None:
    """The first m rows of a case for every m, in both output types, within the checker's limits."""
    oracle, call = Oracle(target, case), Call(target, case)
    for m, dtype in itertools.product(ms, OUT):
        fault = oracle.faults(call(rows(call.case.x, 0, m), out_dtype=dtype))
        assert fault is None, f"{case.name} seed {case.seed}, M {m}, {dtype}: {fault}"


def right_for_sizes(target: Target, x_format: str, n: int, ks: Sequence[int], ms: Sequence[int]) -> None:
    """Full-range cases with a bias and every activation in turn, for one N, every K and every M."""
    for i, k in enumerate(ks):
        activation = ACTIVATIONS[(n + i) % len(ACTIVATIONS)]
        case = full_range_case(n * 1000 + k, max(ms), n, k, x_format=x_format, activation=activation, bias=True)
        right_for_every_m(target, case, ms)


def right_in_random_problems(target: Target, first_seed: int, count: int) -> None:
    """Random shapes, types, activations, biases and memory layouts, each through the project's checker."""
    for seed in range(first_seed, first_seed + count):
        case, form, x_layout, out_layout = random_problem(seed)
        call = Call(target, case, form)
        x = laid_out(call.case.x, x_layout)
        m, n = case.x.shape[0], case.gate.rows
        out, untouched = output_for(out_layout, m, n, case.out_dtype, target.device)
        if x.ndim == 3 and out is not None:
            out = out.unsqueeze(0) if x.shape[0] == 1 else None
        what = f"random problem {seed}, weights {form}, x {x_layout}, out {out_layout}:"
        result = call(x, out=out)
        assert_checked(case, result.reshape(m, n), what)
        assert untouched(), f"{what} memory beside the output was written"


def random_problem(seed: int) -> tuple[Case, str, str, str]:
    """A case, how its weights are given, and the layouts of its tokens and output; the same for the same seed."""
    draw = random.Random(seed)
    m = draw.choice((draw.randint(1, 16), draw.randint(1, 80), draw.randint(1, 300)))
    n = draw.choice((draw.randint(1, 40), draw.randint(1, 300), 8 * draw.randint(1, 40)))
    k = 16 * int(2 ** draw.uniform(0, 6.5))
    case = full_range_case(
        seed + 7_000_000,
        m,
        n,
        k,
        x_format=draw.choice(FORMATS),
        out_dtype=draw.choice(OUT),
        activation=draw.choice(ACTIVATIONS),
        linear=draw.random() < 0.3,
        bias=draw.random() < 0.5,
        active=draw.random() < 0.7,
    )
    return case, draw.choice(FORMS), draw.choice(X_LAYOUTS), draw.choice(OUT_LAYOUTS)


def right_with_extreme_scales(target: Target, x_format: str, linear: bool, k: int = 208) -> None:
    """Global scales far apart and far from one, subnormal ones too, whose products are in the output's range."""
    sets = (
        [(1.0, 1e-30, 1e28), (1.0, 1e20, 1e-25), (1.0, 3e-39, 1e30)]
        if x_format != "nvfp4"
        else [
            (1e30, 1e-30, 3e-31),
            (2.0**-126, 2.0**118, 2.0**115),
            (1e-40, 1e37, 7e36),
            (3e38, 1e-39, 3e-38),
            (1e-20, 1e-2, 1e18),
        ]
    )
    if linear:
        sets = [s for s in sets if 1e-25 < s[0] * s[1] < 1e25]
    for i, (gx, gg, gu) in enumerate(sets):
        case = full_range_case(60 + i, 19, 72, k, x_format=x_format, linear=linear, out_dtype=torch.bfloat16)
        x = with_scale(case.x, gx) if isinstance(case.x, NVFP4Tensor) else case.x
        up = None if case.up is None else with_scale(case.up, gu)
        case = replace(case, x=x, gate=with_scale(case.gate, gg), up=up)
        # some of these have no inverse in float32, which the diagnosis would try
        assert_checked(case, Call(target, case)(), f"global scales {gx:g}, {gg:g}, {gu:g}:", diagnose=False)


def with_scale(t: NVFP4Tensor, global_scale: float) -> NVFP4Tensor:
    return replace(t, global_scale=torch.tensor(global_scale))


# ---- one right answer ----


def assert_exact(expected: Tensor, got: Tensor, what: str) -> None:
    """Equality of values: bit for bit, the sign of a zero aside."""
    wrong = (expected != got).nonzero()
    assert not len(wrong), f"{what}: {len(wrong)} of {got.numel()} elements differ, the first at {wrong[0].tolist()}"


def decodes_every_weight(target: Target, configs: Configs, x_format: str) -> None:
    """One-hot tokens: the output is the decoded weight, every code under every scale, at every place of both matrices."""
    for seed, (n, k) in enumerate(target.some([(128, 16), (72, 208), (200, 336)])):
        for which in ("gate", "up", "linear"):
            given = {"linear": True} if which == "linear" else {"which": which}
            case = one_hot_case(seed, k, n, k, x_format=x_format, **given)  # type: ignore[arg-type]
            call = Call(target, case)
            for dtype in OUT:
                expected = replace(case, out_dtype=dtype).expected().to(target.device)
                for config in configs:
                    what = f"{case.name} {n}x{k} as {which}, {config}, {dtype}"
                    assert_exact(expected, call(out_dtype=dtype, config=config), what)


def exact_for_every_m(target: Target, configs: Configs, x_format: str, linear: bool, ms: Iterable[int], k: int) -> None:
    """Sums that are exact in any order, for every m: tails of tokens, weight rows and K, bit for bit."""
    ms = list(ms)
    case = exact_sum_case(k, max(ms), 136, k, x_format=x_format, linear=linear)
    call = Call(target, case)
    for dtype in OUT:
        expected = replace(case, out_dtype=dtype).expected().to(target.device)
        for config, m in itertools.product(configs, ms):
            got = call(rows(call.case.x, 0, m), out_dtype=dtype, config=config)
            assert_exact(expected[:m], got, f"{case.name}, {config}, M {m}, {dtype}")


# ---- memory and repetition ----


def _padded(x: Operand) -> Operand:
    return laid_out(x, "padded")


def writes_all_and_no_more(target: Target, config: Config | None, x_format: str, linear: bool, k: int = 336,
                           place: Callable[[Operand], Operand] = _padded) -> None:  # fmt: skip
    """NaN where the output goes is all overwritten, guards around it and between its rows are not, and NaN around the tokens
    is not read."""
    for m, n in target.some([(1, 8), (5, 33), (65, 72), (130, 136), (257, 200)], 3):
        case = exact_sum_case(m, m, n, k, x_format=x_format, linear=linear)
        call = Call(target, case)
        x = place(call.case.x)
        for (pad, offset), dtype in itertools.product(((0, 0), (3, 1), (8, 8)), OUT):
            out, untouched = guarded(m, n, dtype, target.device, pad=pad, offset=offset)
            call(x, out=out, config=config)
            what = f"{case.name}, {config}, row padding {pad}, offset {offset}, {dtype}"
            assert_exact(replace(case, out_dtype=dtype).expected().to(target.device), out, what)
            assert untouched(), f"{what}: memory beside the output was written"


def same_bits_every_time(
    target: Target, config: Config | None, case: Case, repeats: int, disturb: Callable[[], object]
) -> None:
    """Repeated calls give the same bits while `disturb` keeps the device busy otherwise."""
    call = Call(target, case)
    first = call(config=config)
    for i in range(repeats):
        disturb()
        assert same_bits(first, call(config=config)), f"{case.name}, {config}: repeat {i + 1} gives other bits"


def rows_do_not_depend_on_m(target: Target, config: Config | None, case: Case) -> None:
    """A row's bits are those it has alone, in any batch and at any place of it."""
    call = Call(target, case)
    x, m = call.case.x, case.x.shape[0]
    whole = call(config=config)
    for count in target.some([c for c in (1, 2, 7, 8, 9, 17, 64, 65, 128, 129, 256, 257) if c < m], 3):
        assert same_bits(whole[:count], call(rows(x, 0, count), config=config)), f"{config}: {count} of {m} rows"
    for i in target.some(sorted({0, 7, 8, 63, 64, 129, 255, m - 1} & set(range(m))), 3):
        assert same_bits(whole[i : i + 1], call(rows(x, i, 1), config=config)), f"{config}: row {i} of {m} alone"
    order = torch.randperm(m, generator=torch.Generator().manual_seed(m)).to(target.device)
    assert same_bits(whole[order], call(taken(x, order), config=config)), f"{config}: rows in another order"


def taken(x: Operand, index: Tensor) -> Operand:
    """Rows `index` of tokens."""
    if not isinstance(x, NVFP4Tensor):
        return x[index]
    scale = x.linear_block_scale().view(torch.uint8)[index].view(torch.float8_e4m3fn)
    return NVFP4Tensor(x.codes[index], scale, x.global_scale)


def columns_do_not_depend_on_n(target: Target, config: Config | None, case: Case) -> None:
    """An output's bits are those it has when the weights are only its own rows."""
    whole = Call(target, case)(config=config)
    for start, count in ((0, 8), (8, 56), (39, 25), (0, case.gate.rows - 1)):
        up = None if case.up is None else case.up.narrow_rows(start, count)
        part = replace(case, gate=case.gate.narrow_rows(start, count), up=up)
        got = Call(target, part)(config=config)
        assert same_bits(whole[:, start : start + count], got), f"{config}: weight rows {start} to {start + count}"


def sum_order(config: Config) -> tuple[object, ...]:
    """What decides the order of a configuration's additions: everything but the sizes of its tile, and with one group along K
    not even how much of K a stage holds."""
    free = {"tokens", "rows", "fragment_sets", "cluster"} | ({"stage_units"} if config.k_groups * config.splits == 1 else set())
    return tuple((f.name, getattr(config, f.name)) for f in fields(config) if f.name not in free)


def configs_of_one_order_agree(configs: Sequence[Config], run: Callable[[Config], Tensor]) -> None:
    """Configurations of one `sum_order` give the same bits."""
    first: dict[tuple[object, ...], tuple[Config, Tensor]] = {}
    for config in configs:
        got = run(config)
        other, bits = first.setdefault(sum_order(config), (config, got))
        assert same_bits(bits, got), f"{config.name} and {other.name} add in one order and give different bits"


def right_after_expanding(target: Target, case: Case) -> None:
    """Tokens that are one row in memory, seen as many."""
    assert isinstance(case.x, Tensor)
    one = with_tokens(case, case.x[:1].expand_as(case.x))
    assert_checked(one, Call(target, one)(), "expanded row:")

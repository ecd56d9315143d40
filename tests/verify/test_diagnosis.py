"""Every named mistake, planted by an implementation of its own, is found by name; and nothing else is claimed wrongly.

The wrong kernel below works on plain arrays with a scalar-level decoder of its own: it shares no code with the
hypotheses, which change operands and ask the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from glu4 import IDENTITY, NVFP4Tensor, clamped_silu, grouped_linear, swiglu_oai
from glu4.scale_layout import SwizzledLayout
from glu4.verify import Case, check, full_range_case


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small products: threads that share cores with other workers only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def scale_value(raw: Tensor, *, fnuz: bool = False) -> Tensor:
    """The value of e4m3 bytes from its bits: 1.mmm * 2^(e - bias), or 0.mmm * 2^(1 - bias) for e = 0."""
    bias = 8 if fnuz else 7
    exponent, mantissa = (raw.int() >> 3) & 15, raw.int() & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 3 - bias).float()
    return torch.where(exponent > 0, normal, mantissa * 2.0 ** (1 - 3 - bias))


@dataclass
class Matrix:
    """One matrix as a wrong kernel sees it: bytes, scale bytes `[rows, K/16]`, one number."""

    packed: Tensor
    scales: Tensor
    g: float
    high_first: bool = False
    fnuz: bool = False
    group: int = 16
    flush: float = 0.0
    unscaled: bool = False

    def values(self) -> Tensor:
        """float32 `[rows, K]` without g."""
        low, high = self.packed & 15, self.packed >> 4
        pair = (high, low) if self.high_first else (low, high)
        codes = torch.stack(pair, -1).flatten(-2).int()
        elements = LEVELS[codes & 7] * torch.where(codes & 8 > 0, -1.0, 1.0)
        scale = scale_value(self.scales, fnuz=self.fnuz)
        scale = torch.where(scale < self.flush, 0.0, scale)
        k = torch.arange(elements.shape[-1])
        per_element = scale[:, k // self.group * (self.group // 16)]
        return elements if self.unscaled else elements * per_element


def matrix(t: NVFP4Tensor) -> Matrix:
    """A 2-D NVFP4 tensor as a Matrix."""
    return Matrix(t.codes.clone(), t.to_linear().block_scale.view(torch.uint8).clone(), float(t.global_scale))


@dataclass
class Kernel:
    """A dense SiLU kernel in float32 whose steps can be replaced one at a time."""

    x: Matrix | Tensor
    gate: Matrix
    up: Matrix
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    keep: Callable[[Tensor], Tensor] = field(default=lambda t: t)

    @classmethod
    def of(cls, case: Case) -> Kernel:
        assert case.up is not None
        x = matrix(case.x) if isinstance(case.x, NVFP4Tensor) else case.x.float()
        return cls(x, matrix(case.gate), matrix(case.up), case.gate_bias, case.up_bias)

    @property
    def operands(self) -> dict[str, Matrix]:
        named = {"x": self.x, "gate": self.gate, "up": self.up}
        return {name: m for name, m in named.items() if isinstance(m, Matrix)}

    def product(self, w: Matrix, bias: Tensor | None) -> Tensor:
        x, g = (self.x.values(), self.x.g) if isinstance(self.x, Matrix) else (self.x, 1.0)
        p = self.keep(x) @ self.keep(w.values()).T * (g * w.g)
        return p if bias is None else p + bias.float()

    def products(self) -> tuple[Tensor, Tensor]:
        return self.product(self.gate, self.gate_bias), self.product(self.up, self.up_bias)

    def run(self, dtype: torch.dtype) -> Tensor:
        g, u = self.products()
        return (g / (1 + torch.exp(-g)) * u).to(dtype)


def names(case: Case, out: Tensor, **options: object) -> set[str]:
    """Names of the causes found; fails when the checker lets the output pass."""
    verdict = check(case, out, **options)
    assert not verdict.ok
    return {d.name for d in verdict.diagnosis}


def details(case: Case, out: Tensor, name: str) -> set[str]:
    return {d.detail for d in check(case, out).diagnosis if d.name == name}


def dense(seed: int = 3, **options: object) -> Case:
    given = {"m": 40, "n": 48, "k": 256} | options
    return full_range_case(seed, given.pop("m"), given.pop("n"), given.pop("k"), **given)


def silu(g: Tensor) -> Tensor:
    return g * torch.sigmoid(g)


def test_the_sound_kernel_passes() -> None:
    for seed in range(10):
        case = dense(seed, bias=seed % 2 == 1, x_format=("nvfp4", "float16")[seed // 2 % 2])
        assert check(case, Kernel.of(case).run(case.out_dtype)).ok


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("one product", lambda g, u: g),
        ("one product", lambda g, u: u),
        ("no activation", lambda g, u: g * u),
        ("activation on the wrong operand", lambda g, u: g * silu(u)),
        ("product missing", lambda g, u: silu(g)),
        ("product missing", lambda g, u: silu(u)),
    ],
)
def test_formula(name: str, formula: Callable[[Tensor, Tensor], Tensor], seed: int) -> None:
    case = dense(seed, bias=seed == 1)
    out = formula(*Kernel.of(case).products()).to(case.out_dtype)
    # without biases, matrices exchanged with their global scales are the activation on the wrong operand
    assert names(case, out) == {name}


FAULTS: dict[str, Callable[[Matrix], None]] = {
    "nibbles swapped": lambda m: setattr(m, "high_first", True),
    "block scales ignored": lambda m: setattr(m, "unscaled", True),
    "divisor as multiplier": lambda m: setattr(m, "g", 1 / m.g),
    "global scale ignored": lambda m: setattr(m, "g", 1.0),
    "group of 32": lambda m: setattr(m, "group", 32),
    "e4m3fnuz decode": lambda m: setattr(m, "fnuz", True),
}


# changes of x and of both weights give the same sums: the same permutation of k, and the same factor of one half
SAME_SUMS = {"nibbles swapped": [{"x"}, {"gate", "up"}], "e4m3fnuz decode": [{"x"}, {"gate", "up"}]}


@pytest.mark.parametrize(
    "where", [{"x"}, {"gate", "up"}, {"x", "gate", "up"}, {"gate"}, {"up"}], ids=lambda names: "+".join(sorted(names))
)
@pytest.mark.parametrize("name", FAULTS)
def test_operand(name: str, where: set[str]) -> None:
    case = dense(11, out_dtype=torch.bfloat16)
    kernel = Kernel.of(case)
    for operand in where:
        FAULTS[name](kernel.operands[operand])
    verdict = check(case, kernel.run(case.out_dtype))
    if name == "nibbles swapped" and len(where) == 3:
        assert verdict.ok  # the same permutation of k everywhere changes nothing
        return
    equal = SAME_SUMS.get(name, [where])
    expected = equal if where in equal else [where]
    prefix = "the first scale of each two, of " if name == "group of 32" else ""
    label = {1: "{0}", 2: "gate and up", 3: "x, gate and up"}
    assert {(d.name, d.detail) for d in verdict.diagnosis} == {(name, prefix + label[len(w)].format(*w)) for w in expected}


def test_a_global_scale_whose_inverse_is_no_float32() -> None:
    case = dense(11, out_dtype=torch.bfloat16)
    assert case.gate.global_scale.ndim == 0
    case = replace(case, gate=replace(case.gate, global_scale=torch.tensor(2.0**-140)))
    verdict = check(case, torch.ones(case.out_shape, dtype=torch.bfloat16))
    assert not verdict.ok


def test_nibbles_of_16_bit_tokens() -> None:
    case = dense(5, x_format="bfloat16")
    kernel = Kernel.of(case)
    kernel.gate.high_first = kernel.up.high_first = True
    assert details(case, kernel.run(case.out_dtype), "nibbles swapped") == {"gate and up"}


@pytest.mark.parametrize("as_linear", [True, False])
@pytest.mark.parametrize("where", ["x", "gate"])
def test_scale_layout(where: str, as_linear: bool) -> None:
    # with 16 scale columns one mistake is the inverse of itself, and the two are the same
    case = dense(7, m=256, n=256, k=512)
    kernel = Kernel.of(case)
    operand = kernel.operands[where]
    layout = SwizzledLayout(256, 32)
    wrong = torch.zeros_like(operand.scales)
    columns = 512 // 16
    # byte by byte through the published formula
    for i in range(256):
        for j in range(columns):
            if as_linear:
                place = layout.coordinates(i * columns + j)
                assert place is not None
                wrong[i, j] = operand.scales[place]
            else:
                wrong[i, j] = operand.scales.flatten()[layout.offset(i, j)]
    operand.scales = wrong
    name = "swizzled scales read as linear" if as_linear else "linear scales read as swizzled"
    out = kernel.run(case.out_dtype)
    assert names(case, out) == {name}
    assert details(case, out, name) == {where}


@pytest.mark.parametrize(("taken", "detail"), [("gate", "the gate's"), ("up", "up's")])
def test_shared_global_scale(taken: str, detail: str) -> None:
    case = dense(13)
    kernel = Kernel.of(case)
    kernel.gate.g = kernel.up.g = kernel.operands[taken].g
    out = kernel.run(case.out_dtype)
    assert names(case, out) == {"shared global scale"}
    assert details(case, out, "shared global scale") == {detail}


def test_larger_global_scale_of_each_expert() -> None:
    for seed in range(20):
        case = dense(seed, m=24, group_sizes=[8, 8, 8])
        assert case.up is not None
        above = case.gate.global_scale > case.up.global_scale
        if bool(above.any()) and not bool(above.all()):
            break
    else:
        pytest.fail("no seed drew larger scales on both sides")
    out = experts(case, lambda i: i, lambda i: i, larger=True)
    assert details(case, out, "shared global scale") == {"the larger"}


def test_matrices_swapped_but_not_their_global_scales() -> None:
    case = dense(17)
    kernel = Kernel.of(case)
    kernel.gate.packed, kernel.up.packed = kernel.up.packed, kernel.gate.packed
    kernel.gate.scales, kernel.up.scales = kernel.up.scales, kernel.gate.scales
    assert names(case, kernel.run(case.out_dtype)) == {"gate and up swapped"}


def test_matrices_swapped_but_not_their_biases() -> None:
    case = dense(17, bias=True)
    kernel = Kernel.of(case)
    kernel.gate, kernel.up = kernel.up, kernel.gate
    assert details(case, kernel.run(case.out_dtype), "gate and up swapped") == {"biases in place"}


@pytest.mark.parametrize("which", ["gate", "up", "gate and up"])
def test_bias_dropped(which: str) -> None:
    case = dense(19, bias=True)
    kernel = Kernel.of(case)
    if "gate" in which:
        kernel.gate_bias = None
    if "up" in which:
        kernel.up_bias = None
    assert details(case, kernel.run(case.out_dtype), "bias dropped") == {which}


def gated(g: Tensor, u: Tensor, alpha: float, beta: float, limit: float) -> Tensor:
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return (u + beta) * g / (1 + torch.exp(-alpha * g))


@pytest.mark.parametrize(
    ("activation", "constants", "detail"),
    [
        (clamped_silu(1.5), (1.0, 0.0, torch.inf), "limit"),
        (swiglu_oai(limit=2.0), (1.702, 1.0, torch.inf), "limit"),
        (swiglu_oai(limit=2.0), (1.0, 1.0, 2.0), "alpha"),
        (swiglu_oai(limit=2.0), (1.702, 0.0, 2.0), "beta"),
        (swiglu_oai(limit=2.0), (1.0, 0.0, torch.inf), "alpha, beta and limit"),
    ],
)
def test_activation_constants(activation, constants, detail) -> None:  # type: ignore[no-untyped-def]
    case = dense(23, activation=activation)
    g, u = Kernel.of(case).products()
    right = gated(g, u, activation.alpha, activation.beta, activation.limit).to(case.out_dtype)
    assert check(case, right).ok
    out = gated(g, u, *constants).to(case.out_dtype)
    assert details(case, out, "activation constants dropped") == {detail}


@pytest.mark.parametrize("threshold", [2.0**-6, 2.0**-4])
def test_small_scales_flushed(threshold: float) -> None:
    # x has 16-bit values so that no large token scale hides the small weight scales; the seed draws small ones
    for seed in range(40):
        case = dense(seed, x_format="float16", k=64)
        kernel = Kernel.of(case)
        if float(scale_value(kernel.gate.scales).max()) < 1:
            break
    else:
        pytest.fail("no seed drew small scales")
    kernel.gate.flush = kernel.up.flush = threshold
    out = kernel.run(case.out_dtype)
    found = details(case, out, "small scales flushed")
    exponent = int(torch.tensor(threshold).log2())
    assert any(d.startswith(f"scales below 2^{exponent} of gate") for d in found)


@pytest.mark.parametrize(("k0", "k1"), [(64, 80), (448, 512), (0, 256), (496, 512), (256, 272)])
@pytest.mark.parametrize("which", ["", " of the gate product", " of the up product"])
def test_k_range_dropped(k0: int, k1: int, which: str) -> None:
    case = dense(29, k=512)
    kernel = Kernel.of(case)
    for name in ("gate", "up"):
        if not which or name in which:
            kernel.operands[name].packed[:, k0 // 2 : k1 // 2] = 0
    out = kernel.run(case.out_dtype)
    tail = "the tail of K, " if k1 == 512 else ""
    assert names(case, out) == {"K range dropped"}
    assert f"{tail}k = {k0}..{k1 - 1}{which}" in details(case, out, "K range dropped")


@pytest.mark.parametrize(("m", "n"), [(40, 48), (48, 48)])
def test_output_transposed(m: int, n: int) -> None:
    case = dense(31, m=m, n=n)
    right = Kernel.of(case).run(case.out_dtype)
    assert names(case, right.T.contiguous().view(m, n)) == {"output transposed"}
    if m != n:
        verdict = check(case, right.T.contiguous())
        assert verdict.findings[0].layer == "shape"
        assert [d.name for d in verdict.diagnosis] == ["output transposed"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_intermediates(dtype: torch.dtype, seed: int) -> None:
    case = dense(seed, m=64, n=96, k=512, out_dtype=dtype)
    g, u = Kernel.of(case).products()
    name = str(dtype).removeprefix("torch.")
    g16, u16 = g.to(dtype).float(), u.to(dtype).float()
    for out, detail in (
        (silu(g16) * u16, f"gate and up in {name}"),
        (silu(g).to(dtype).float() * u, f"silu(gate) in {name}"),
        (silu(g16).to(dtype).float() * u16, f"gate, up and silu(gate) in {name}"),
    ):
        verdict = check(case, out.to(dtype))
        assert "norm" in {f.layer for f in verdict.findings}
        assert [d.detail for d in verdict.diagnosis] == [detail]


POISON = {"zeros": 0.0, "NaN": torch.nan, "the number 7": 7.0}


@pytest.mark.parametrize("held", POISON)
def test_rows_not_written(held: str) -> None:
    case = dense(37, m=200)
    out = Kernel.of(case).run(case.out_dtype)
    out[128:192] = POISON[held]
    (cause,) = check(case, out).diagnosis
    assert cause.name == "not written"
    assert held in cause.sentence
    assert cause.detail == "rows 128..191 (tiles of 64)"


def test_tile_not_written_holds_what_was_there() -> None:
    case = dense(37, m=128, n=128)
    initial = torch.randn(128, 128).half()
    out = Kernel.of(case).run(case.out_dtype)
    out[64:, :32] = initial[64:, :32]
    (cause,) = check(case, out, initial=initial).diagnosis
    assert cause.sentence.endswith("what was there before")
    assert cause.detail == "rows 64..127 (tiles of 64), columns 0..31 (tiles of 32)"


# ---- experts ----


def experts(
    case: Case, pick: Callable[[int], int], scale: Callable[[int], int], shift: int = 0, larger: bool = False
) -> Tensor:
    """A grouped kernel: group e uses expert pick(e) and the global scales of scale(e); ends move by `shift` rows."""
    assert case.group_offsets is not None
    assert case.up is not None
    assert isinstance(case.x, NVFP4Tensor)
    ends = case.group_offsets.tolist()
    ends = [ends[0], *(min(max(e + shift, 0), ends[-1]) for e in ends[1:-1]), ends[-1]]
    out = torch.zeros(case.out_shape, dtype=case.out_dtype)
    x = matrix(case.x)
    for e in range(len(ends) - 1):
        a, b = ends[e], ends[e + 1]
        if b > a:
            rows = Matrix(x.packed[a:b], x.scales[a:b], x.g)
            gate, up = (matrix(w[pick(e)]) for w in (case.gate, case.up))
            gate.g, up.g = (float(w.global_scale[scale(e)]) for w in (case.gate, case.up))
            if larger:
                gate.g = up.g = max(gate.g, up.g)
            out[a:b] = Kernel(rows, gate, up).run(case.out_dtype)
    return out


def test_experts() -> None:
    case = dense(41, m=30, group_sizes=[9, 0, 12, 2, 7])
    e = 5

    def own(i: int) -> int:
        return i

    assert check(case, experts(case, own, own)).ok
    assert details(case, experts(case, lambda i: (i + 1) % e, lambda i: (i + 1) % e), "wrong expert") == {"of the next expert"}
    assert details(case, experts(case, lambda i: 0, lambda i: 0), "wrong expert") == {"of expert 0"}
    packed = [0, 0, 1, 2, 3]
    found = details(case, experts(case, packed.__getitem__, packed.__getitem__), "wrong expert")
    assert "of the experts counted without the empty ones" in found
    out = experts(case, own, lambda i: (i - 1) % e)
    assert details(case, out, "wrong expert's global scale") == {"of the previous expert"}
    assert details(case, experts(case, own, own, shift=1), "group offsets shifted") == {"one row late"}
    assert details(case, experts(case, own, own, shift=-1), "group offsets shifted") == {"one row early"}


@pytest.mark.parametrize("x_format", ["nvfp4", "float16"])
def test_a_group_scaled_by_another_ones_scale(x_format: str) -> None:
    """grouped_linear with one group's, or every group's, global scale taken for another's."""
    case = full_range_case(47, 30, 48, 256, group_sizes=[9, 0, 12, 2, 7], linear=True, x_format=x_format)
    assert case.group_offsets is not None
    g = case.gate.global_scale
    assert len(g.unique()) == 5

    def run(scale: Tensor) -> Tensor:
        matrix = NVFP4Tensor(case.gate.codes, case.gate.block_scale, scale)
        return grouped_linear(case.x, matrix, case.group_offsets, out_dtype=case.out_dtype)

    assert check(case, run(g)).ok
    assert details(case, run(g.roll(1)), "wrong expert's global scale") == {"of the previous expert"}
    assert details(case, run(g[0].expand(5)), "wrong expert's global scale") == {"of expert 0"}
    for e in (0, 2, 3, 4):
        one = g.clone()
        one[e] = g[(e + 2) % 5]
        verdict = check(case, run(one))
        assert not verdict.ok
        rows = case.group_offsets.tolist()
        assert f"rows {rows[e]}..{rows[e + 1] - 1}" in verdict.summary()


def test_batch_entry() -> None:
    case = dense(43, batch=3)
    assert isinstance(case.x, NVFP4Tensor)
    assert case.up is not None
    out = torch.stack(
        [Kernel(matrix(case.x[i]), matrix(case.gate[0]), matrix(case.up[0])).run(case.out_dtype) for i in range(3)]
    )
    assert details(case, out, "wrong expert") == {"of batch entry 0"}


# ---- causes that are not listed ----


def test_unknown_cause_says_where_and_how_much() -> None:
    case = dense(47, m=64, n=64)
    out = Kernel.of(case).run(case.out_dtype)
    out[5, 7] += 100
    (cause,) = check(case, out).diagnosis
    assert cause.name == "unknown"
    assert not cause.exact
    assert cause.detail.startswith("1 of 4096 elements, in row 5 and in column 7")
    out = Kernel.of(case).run(case.out_dtype)
    out[:, 32:40] *= -3
    (cause,) = check(case, out).diagnosis
    assert "in columns 32..39" in cause.detail


def test_two_mistakes_name_the_nearer() -> None:
    case = dense(53, bias=True)
    kernel = Kernel.of(case)
    kernel.gate.high_first = kernel.up.high_first = True
    kernel.up.g *= 1.01
    (cause,) = check(case, kernel.run(case.out_dtype)).diagnosis
    assert cause.name == "unknown"
    assert "nearest: the two codes of a byte are exchanged" in cause.detail


def test_right_results_have_no_diagnosis() -> None:
    verdict = check(case := dense(59), Kernel.of(case).run(case.out_dtype))
    assert verdict.ok
    assert not verdict.findings
    assert not verdict.diagnosis


def test_linear_and_identity() -> None:
    case = dense(61, linear=True, bias=True)
    assert isinstance(case.x, NVFP4Tensor)
    x, w = matrix(case.x), matrix(case.gate)
    assert case.gate_bias is not None
    product = x.values() @ w.values().T * (x.g * w.g)
    assert check(case, (product + case.gate_bias.float()).to(case.out_dtype)).ok
    assert names(case, product.to(case.out_dtype)) == {"bias dropped"}
    case = dense(61, activation=IDENTITY)
    g, u = Kernel.of(case).products()
    assert check(case, (g * u).to(case.out_dtype)).ok
    assert details(case, g.to(case.out_dtype), "one product") == {"gate"}

"""NVFP4 tokens in every form that a kernel decodes itself, or that is decoded ahead of it; and what must hold of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glu4 import IDENTITY, NVFP4Tensor
from glu4.backends.hopper.config import SHIPPED, Config
from glu4.backends.hopper.tokens import NVFP4, format_of
from glu4.nvfp4 import _unchecked, pack_codes
from glu4.verify.case import Case
from gpu.harness import Call, Target, assert_checked, same_bits, with_tokens
from gpu.proofs import Configs, assert_exact, with_scale

_ONE = 2  # the code of 1.0
NAN_SCALE = 0x7F


def among(t: Tensor, offset: int, around: int = NAN_SCALE) -> Tensor:
    """The same values `offset` bytes past an aligned address, among bytes `around`, which as scales are NaN."""
    raw = t.contiguous().view(torch.uint8).flatten()
    buffer = torch.full((raw.numel() + 1024 + offset,), around, dtype=torch.uint8, device=t.device)
    return buffer[512 + offset : 512 + offset + raw.numel()].copy_(raw).view(t.dtype).view(t.shape)


def _placed(codes_at: int, scales_at: int, swizzled: bool = False) -> Callable[[NVFP4Tensor], NVFP4Tensor]:
    def change(x: NVFP4Tensor) -> NVFP4Tensor:
        x = x.to_swizzled() if swizzled else x.to_linear()
        return _unchecked(among(x.codes, codes_at), among(x.block_scale, scales_at), x.global_scale)

    return change


def _padded_with_nan(x: NVFP4Tensor) -> NVFP4Tensor:
    """Swizzled scales, NaN where only padding is stored."""
    ones = _unchecked(x.codes, torch.ones_like(x.linear_block_scale().float()).to(torch.float8_e4m3fn), x.global_scale)
    scales = x.to_swizzled().block_scale.view(torch.uint8).clone()
    scales[ones.to_swizzled().block_scale.view(torch.uint8) == 0] = NAN_SCALE
    return _unchecked(x.codes, scales.view(torch.float8_e4m3fn), x.global_scale)


# by name: the same tokens, and whether a kernel may decode them itself where K is a multiple of 64
FORMS: dict[str, tuple[Callable[[NVFP4Tensor], NVFP4Tensor], bool]] = {
    "linear": (_placed(0, 0), True),
    "linear, at 8 and 4 bytes": (_placed(8, 4), True),
    "linear, codes at 4 bytes": (_placed(4, 4), False),
    "linear, scales at 1 byte": (_placed(8, 1), False),
    "swizzled": (_padded_with_nan, False),
    "swizzled, scales at 1 byte": (_placed(8, 1, swizzled=True), False),
    "codes at 1 byte, by torch": (_placed(1, 0), False),
}


def formed(x: NVFP4Tensor, form: str) -> NVFP4Tensor:
    change, readable = FORMS[form]
    made = change(x)
    assert (format_of(made) == NVFP4) == (readable and x.k % 64 == 0)
    return made


def exact_in_every_form(target: Target, configs: Configs, case: Case, ms: Sequence[int]) -> None:
    """Sums that are exact in any order, bit for bit, for every form of the tokens and every m."""
    assert isinstance(case.x, NVFP4Tensor)
    call, expected = Call(target, case), case.expected().to(target.device)
    for m in ms:
        x = call.case.x.narrow_rows(0, m)
        for form in FORMS:
            for config in configs:
                assert_exact(expected[:m], call(formed(x, form), config=config), f"{case.name}, M {m}, {form}, {config}")


def decodes_every_token(target: Target, configs: Configs, ks: Sequence[int], m: int = 128) -> None:
    """One-hot weights of 1: the output is the tokens, every code under every scale but NaN, at every place of K."""
    for k in ks:
        blocks = k // 16
        codes = torch.tensor([i | i + 1 << 4 for i in range(0, 16, 2)], dtype=torch.uint8).repeat(m, blocks)
        scales = (torch.arange(m * blocks).view(m, blocks) * 5 % 127).to(torch.uint8)
        x = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(1.0))
        one = pack_codes(_ONE * torch.eye(k, dtype=torch.uint8))
        weight = NVFP4Tensor(one, torch.ones(k, blocks).to(torch.float8_e4m3fn), torch.tensor(1.0))
        case = Case("every token", k, x, weight, None, IDENTITY, None, None, torch.float16)
        assert m * blocks < 127 or len(scales.unique()) == 127
        exact_in_every_form(target, configs, case, (m,))


def same_bits_in_every_form(target: Target, configs: Configs, case: Case) -> None:
    """Every form of the tokens gives the bits of W4A16 with the decoded tokens, for one configuration; x's global scale is then
    in the weights', a power of two, so that nothing is rounded otherwise."""
    assert isinstance(case.x, NVFP4Tensor)
    power = 2.0 ** round(float(case.x.global_scale.log2()))
    case = with_tokens(case, with_scale(case.x, power))
    up = None if case.up is None else with_scale(case.up, float(case.up.global_scale) * power)
    gate = with_scale(case.gate, float(case.gate.global_scale) * power)
    plain = Call(target, replace(case, x=case.x.decode(torch.float16), gate=gate, up=up))
    call = Call(target, case)
    for config in configs:
        expected = plain(config=config)
        for form in FORMS:
            got = call(formed(call.case.x, form), config=config)
            assert same_bits(expected, got), f"{case.name}, {config}: {form} gives other bits than decoded tokens"


def right_in_batches(target: Target, case: Case, form: str) -> None:
    """A batch `[L, M, K]` with a global scale each, with weights of its own and with shared ones, within the checker's limits."""
    assert isinstance(case.x, NVFP4Tensor)
    change = NVFP4Tensor.to_swizzled if form == "swizzled" else FORMS[form][0]
    call = Call(target, case, "object")
    assert_checked(case, call(change(call.case.x)), f"{form}, weights of its own:")
    shared = replace(case, gate=case.gate[0], up=None if case.up is None else case.up[0])
    got = Call(target, shared)(change(call.case.x))
    for i in range(case.x.shape[0]):
        assert_checked(with_tokens(shared, case.x[i]), got[i], f"{form}, shared weights, matrix {i}:")


OWN: tuple[Config, ...] = tuple(c for c in SHIPPED if c.takes_nvfp4)

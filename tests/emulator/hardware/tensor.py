"""TMA copies and reductions of tensors: ranks, types, swizzles, edges, fills and traversal strides.

Innermost coordinates are multiples of 16 bytes, and those of stores and reductions not negative: hardware takes other copies
for illegal instructions, as the cases of `_refused` record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from emulator.hardware.case import WAIT, Case, copy_in, dump, fill, kernel, random_bytes, values

__all__ = ["BITS", "cases", "tensor_bytes", "tensor_map"]

BITS = {"u8": 8, "u16": 16, "u32": 32, "s32": 32, "u64": 64, "s64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
        "tf32": 32, "f32_ftz": 32, "tf32_ftz": 32}  # fmt: skip
ROOM = 8192
_HEAD = f".shared .align 1024 .b8 room[{ROOM}]; .shared .align 8 .b64 bar; .reg .b32 %t, %ok, %to; .reg .b64 %map, %out, %pol; .reg .pred %first; mov.u32 %t, %tid.x; setp.eq.u32 %first, %t, 0; mov.u64 %map, pmap; cvta.param.u64 %map, %map; mov.u32 %to, room;\n"
_OPEN = (
    "@%first mbarrier.init.shared.b64 [bar], 1; @%first fence.mbarrier_init.release.cluster; fence.proxy.async; bar.sync 0;\n"
)


def tensor_map(kind: str, shape: Sequence[int], box: Sequence[int], **more: Any) -> dict[str, Any]:
    """A tensor map in the launch format, of a tensor whose rows are padded to 16 bytes."""
    strides = []
    size = -(-shape[0] * BITS[kind] // 128) * 16
    for extent in shape[1:]:
        strides.append(size)
        size *= extent
    return {
        "buffer": "tensor",
        "element_type": kind,
        "global_shape": list(shape),
        "global_strides_bytes": strides,
        "box_shape": list(box),
        **more,
    }


def tensor_bytes(described: dict[str, Any]) -> int:
    strides, shape = described["global_strides_bytes"], described["global_shape"]
    return strides[-1] * shape[-1] if strides else -(-shape[0] * BITS[described["element_type"]] // 128) * 16


def _box_bytes(described: dict[str, Any]) -> int:
    steps = [1, *described.get("element_strides", [1] * len(described["box_shape"]))[1:]]
    return prod(-(-b // s) for b, s in zip(described["box_shape"], steps)) * BITS[described["element_type"]] // 8


def _coordinates(at: Sequence[int]) -> tuple[str, str]:
    names = [f"%x{i}" for i in range(len(at))]
    return f".reg .b32 %x<{len(at)}>;" + "".join(f"mov.s32 {n}, {v};" for n, v in zip(names, at)), "{" + ", ".join(names) + "}"


def _load(
    name: str, described: dict[str, Any], at: Sequence[int], *, offset: int = 0, hints: bool = False, probe: bool = False
) -> Case:
    """A box into shared memory that holds a pattern; the whole of it is the result, and whether the mbarrier completed."""
    set_up, where = _coordinates(at)
    rank = len(at)
    size = _box_bytes(described)
    extra, policy = ("", "")
    if hints:
        set_up += f"createpolicy.fractional.L2::evict_last.b64 %pol, 1.0; prefetch.tensormap [%map]; cp.async.bulk.prefetch.tensor.{rank}d.L2.global.tile [%map, {where}];"
        extra, policy = ".L2::cache_hint", ", %pol"
    copy = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{extra} [%to], [%map, {where}], [bar]{policy};"
    body = f"""{_HEAD}{fill(ROOM, 128)} {_OPEN} {set_up} add.u32 %to, %to, {offset};
@!%first bra WAITING; mbarrier.arrive.expect_tx.shared.b64 _, [bar], {size}; {copy}
WAITING: {WAIT.format(bar="bar", phase=0)} ld.param.u64 %out, [pout]; mad.wide.u32 %out, %t, 4, %out; st.global.b32 [%out], %ok; {dump(ROOM, 128, offset="512")}"""
    launch = {
        "grid": [1],
        "block": [128],
        "buffers": {"out": {"dtype": "uint8", "shape": [ROOM + 512]}},
        "params": [{"ptr": "out"}, {"tensor_map": described}],
    }

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        data = random_bytes(rng, tensor_bytes(described))
        if probe and described["element_type"] in ("f32_ftz", "tf32", "tf32_ftz"):
            words = data.view(np.uint32)
            words[rng.random(words.size) < 0.25] &= 0x807FFFFF  # subnormal numbers
        return {"tensor": data}

    return Case(f"tensor/load-{name}", kernel(body, maps=("pmap",)), launch, make, compare="probe" if probe else "bits")


def _loads() -> list[Case]:
    found = []
    spans = {"none": 64, "32B": 32, "64B": 64, "128B": 128}
    for swizzle, span in spans.items():
        for kind in ("u8", "f16", "f32", "u64"):
            inner = span * 8 // BITS[kind]
            described = tensor_map(kind, (3 * inner, 40), (inner, 24), swizzle=swizzle)
            found.append(_load(f"{swizzle}-{kind}", described, (inner // 2, 5)))
        described = tensor_map("bf16", (span, 20, 6), (span // 2, 10, 3), swizzle=swizzle)
        found.append(_load(f"{swizzle}-3d", described, (span - 8, 14, -1)))
        described = tensor_map("u16", (span, 24), (span // 2, 13), swizzle=swizzle)
        found.append(_load(f"{swizzle}-offset", described, (8, 3), offset=128 * 11))
    shapes = {1: ((200,), (64,), (32,)), 2: ((70, 9), (32, 8), (4, 1)), 3: ((40, 7, 5), (24, 3, 2), (8, 4, 2)),
              4: ((36, 5, 4, 3), (16, 2, 3, 2), (12, 2, 1, 1)), 5: ((20, 4, 3, 4, 3), (8, 2, 2, 3, 2), (8, 1, 1, 1, 1))}  # fmt: skip
    for rank, (shape, box, at) in shapes.items():
        found.append(_load(f"rank-{rank}", tensor_map("f32", shape, box), at, hints=True))
        low = tuple(-b // 2 for b in box)
        found.append(_load(f"rank-{rank}-low", tensor_map("f32", shape, box), low))
        high = ((shape[0] - box[0] // 2) // 4 * 4, *(s - b // 2 for s, b in zip(shape[1:], box[1:])))
        found.append(_load(f"rank-{rank}-high-nan", tensor_map("f32", shape, box, oob_fill="nan"), high))
        outside = (*(0 for _ in low[1:]), shape[-1] + 8)
        found.append(_load(f"rank-{rank}-outside", tensor_map("bf16", shape, box, oob_fill="nan"), outside))
    for kind in BITS:
        probe = kind.startswith("tf32") or kind.endswith("ftz")
        inner = 64 * 8 // BITS[kind]
        found.append(_load(f"type-{kind}", tensor_map(kind, (inner + 5, 9), (inner, 6)), (inner // 4, -2), probe=probe))
        if kind[0] in "fbt":
            described = tensor_map(kind, (inner + 5, 9), (inner, 6), oob_fill="nan")
            found.append(_load(f"type-{kind}-nan", described, (inner // 2, 5), probe=probe))
    for n, steps in enumerate(((1, 2), (1, 3), (2, 1), (1, 8), (3, 5))):
        found.append(_load(f"steps-{n}", tensor_map("u16", (80, 60), (64, 30), element_strides=list(steps)), (8, 7)))
    found.append(
        _load("steps-3d", tensor_map("f16", (70, 20, 20), (32, 9, 10), element_strides=[1, 2, 4], swizzle="64B"), (-8, 15, 3))
    )
    found.append(_load("steps-low", tensor_map("f16", (70, 20), (32, 16), element_strides=[1, 3]), (0, -4)))
    # rows narrower than the swizzle's span
    for swizzle, inner in (("64B", 32), ("128B", 32), ("128B", 64), ("128B", 48), ("32B", 16)):
        found.append(_load(f"narrow-{swizzle}-{inner}", tensor_map("u8", (192, 30), (inner, 20), swizzle=swizzle), (16, 2)))
    return found


# stores and reductions


def _store(
    name: str, described: dict[str, Any], at: Sequence[int], operation: str = "", *, offset: int = 0, probe: bool = False
) -> Case:
    set_up, where = _coordinates(at)
    word = "cp.reduce" if operation else "cp"
    text = f"{word}.async.bulk.tensor.{len(at)}d.global.shared::cta{'.' + operation if operation else ''}.tile.bulk_group [%map, {where}], [%to];"
    body = f"{_HEAD}{copy_in(ROOM, 128)} {_OPEN} {set_up} add.u32 %to, %to, {offset}; @!%first bra DONE; {text} cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; DONE: bar.sync 0;"
    launch = {"grid": [1], "block": [128], "params": [{"ptr": "in"}, {"tensor_map": described}]}
    kind = described["element_type"]

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        size = tensor_bytes(described)
        if not operation:
            return {"in": random_bytes(rng, ROOM), "tensor": random_bytes(rng, size)}
        drawn = kind if kind in ("f16", "bf16", "f32", "f64") else f"i{BITS[kind]}"
        a, b = values((drawn, drawn), max(ROOM, size) * 8 // BITS[kind], rng)
        return {"in": a.view(np.uint8)[:ROOM], "tensor": b.view(np.uint8)[:size]}

    family = "reduce" if operation else "store"
    return Case(
        f"tensor/{family}-{name}",
        kernel(body, ("pin",), maps=("pmap",)),
        launch,
        make,
        outputs=("tensor",),
        compare="probe" if probe else "bits",
    )


def _stores() -> list[Case]:
    found = []
    for swizzle, span in {"none": 64, "32B": 32, "64B": 64, "128B": 128}.items():
        described = tensor_map("f16", (span, 40), (span // 2, 24), swizzle=swizzle)
        found.append(_store(swizzle, described, (span // 4, 5)))
        found.append(_store(f"{swizzle}-edge", described, (span - 8, 30), offset=1152))
        described = tensor_map("f32", (span, 8, 6), (span // 4, 5, 3), swizzle=swizzle)
        found.append(_store(f"{swizzle}-3d", described, (span - 4, 6, 4)))
    shapes = {1: ((200,), (64,), (172,)), 2: ((70, 9), (32, 8), (44, 4)), 3: ((40, 7, 5), (24, 3, 2), (20, 5, 4)),
              4: ((36, 5, 4, 3), (16, 2, 3, 2), (24, 4, 2, 2)), 5: ((20, 4, 3, 4, 3), (8, 2, 2, 3, 2), (16, 3, 2, 2, 2))}  # fmt: skip
    for rank, (shape, box, at) in shapes.items():
        found.append(_store(f"rank-{rank}", tensor_map("f32", shape, box), at))
    for kind in BITS:
        probe = kind.startswith("tf32") or kind.endswith("ftz")
        inner = 64 * 8 // BITS[kind]
        found.append(_store(f"type-{kind}", tensor_map(kind, (inner + 5, 9), (inner, 6)), (inner // 4, 5), probe=probe))
    for swizzle, inner in (("64B", 32), ("128B", 32), ("128B", 48), ("32B", 16)):
        found.append(_store(f"narrow-{swizzle}-{inner}", tensor_map("u8", (192, 30), (inner, 20), swizzle=swizzle), (16, 2)))
    found.append(_store("outside", tensor_map("u32", (32, 9), (16, 4)), (64, 20)))
    found.append(_store("steps", tensor_map("u16", (80, 60), (64, 30), element_strides=[1, 4]), (8, 7)))
    return found


# operations that exist for each element type: as those of cp.reduce.async.bulk (PTX ISA 9.7.9.25.4.2)
_OPERATIONS = {
    "u32": ("add", "min", "max", "inc", "dec", "and", "or", "xor"),
    "s32": ("add", "min", "max"),
    "u64": ("add", "min", "max", "and", "or", "xor"),
    "s64": ("min", "max"),
    "f16": ("add", "min", "max"),
    "bf16": ("add", "min", "max"),
    "f32": ("add",),
    "f64": ("add",),
}


def _reductions() -> list[Case]:
    found = []
    for kind, operations in _OPERATIONS.items():
        inner = 64 * 8 // BITS[kind]
        for operation in operations:
            described = tensor_map(kind, (2 * inner, 20), (inner, 16), swizzle="64B" if operation == "add" else "none")
            found.append(_store(f"{kind}-{operation}", described, (3 * inner // 2, 10), operation))
    return found


def _refused() -> list[Case]:
    """Copies that hardware takes for illegal instructions."""
    wide = tensor_map("f32", (64, 20), (16, 8))
    halves = tensor_map("f16", (64, 20), (32, 8), swizzle="64B")
    found = [
        _load("f32-2", wide, (2, 0)),
        _load("f16-low", halves, (-4, 0)),
        _load("u8-8", tensor_map("u8", (256,), (64,)), (8,)),
        _store("f16-4", halves, (4, 0)),
        _store("low", halves, (0, -1)),
        _store("low-inner", wide, (-8, 0)),
        _store("f32-add-low", wide, (0, -1), "add"),
    ]
    return [replace(case, name=case.name.replace("tensor/", "refused/"), compare="refused") for case in found]


def cases() -> list[Case]:
    return [*_loads(), *_stores(), *_reductions(), *_refused()]

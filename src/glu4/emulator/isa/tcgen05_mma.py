"""tcgen05.mma, cp and shift: what one thread issues to the tensor core, done when the schedule says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.async_queue import Operation, Work
from glu4.emulator.clocks import ASYNC, KNOWN, STREAM, TENSOR
from glu4.emulator.descriptors import SharedDescriptor, decode_tcgen05, read_operand
from glu4.emulator.hazards import VIA_ASYNC, VIA_TENSOR
from glu4.emulator.instruction_descriptor import BLOCK_SCALED, InstructionDescriptor, decode_instruction
from glu4.emulator.isa.access import Fault, addresses
from glu4.emulator.isa.asynchronous import Issue
from glu4.emulator.isa.registry import Context, Modifiers, Step, U
from glu4.emulator.isa.tmemory import TensorMemory, column_bits, index_of
from glu4.emulator.lanes import one_lane
from glu4.emulator.matrix import (
    OPERAND_BYTES,
    decode_containers,
    decode_operand,
    read_scales,
    storage_bits,
    tcgen05_multiply,
    unpack_sixteens,
)
from glu4.emulator.ptx.module import Address, Operand, Vector
from glu4.emulator.split import Split
from glu4.emulator.tmem import Cells, accumulator_cells, cp_cells, is_split, operand_cells, scale_cells, shift_cells

__all__ = ["copy", "multiply", "shift"]

_KINDS = ("kind::f16", "kind::tf32", "kind::f8f6f4", "kind::i8", "kind::mxf8f6f4", "kind::mxf4", "kind::mxf4nvf4")
_VECTORS = ("scale_vec::1X", "scale_vec::2X", "scale_vec::4X", "block16", "block32")
_BUFFERS = ("a", "b0", "b1", "b2", "b3")
_COLLECTORS = tuple(f"collector::{buffer}::{word}" for buffer in _BUFFERS for word in ("fill", "use", "lastuse", "discard"))
_WORDS = {"f32": np.float32, "s32": np.int32}  # what a 32-bit word of D is
_CP_SHAPES = ("128x256b", "4x256b", "128x128b", "64x128b", "32x128b")
_CP_MULTICASTS = ("warpx2::02_13", "warpx2::01_23", "warpx4")


class _Stream:
    """One operation at its issue: whose tensor memory and which columns it uses, what it waits for."""

    def __init__(self, w: Split, context: Context, lane: int, group: int) -> None:
        self.issue = Issue(w, context, one_lane(lane))
        warp = w.warp
        self.warp = warp
        warp.counts[STREAM] += 1
        self.time = warp.counts[STREAM]
        self.entity = warp.entity + STREAM
        # operations of one thread that share columns are in order
        rows = self.issue.clock.fit(warp.cta.cluster.entities)
        rows[(KNOWN, ASYNC, TENSOR), self.entity] = self.time - 1
        ctas = warp.cta.cluster.ctas
        self.ctas = [warp.cta] if group == 1 else ctas[warp.cta.rank & ~1 :][:2]
        self.columns: dict[int, int] = {}

    def uses(self, cta: Any, cells: Cells) -> bool:
        """Note columns; False, with a report, if they are not allocated."""
        bits = column_bits(cells)
        self.columns[cta.rank] = self.columns.get(cta.rank, 0) | bits
        if not TensorMemory.of(cta).covers(bits):
            first, last = int(cells.columns.min()), int(cells.columns.max())
            self.issue.report("tensor memory lifetime", f"columns {first} to {last} of CTA {cta.index} are not all allocated")
            return False
        return True

    def tensor(self, cta: Any, cells: Cells, write: bool, read: bool = False) -> tuple[Any, Any]:
        """Enter an access to tensor memory; returns the index of the cells."""
        index = index_of(cells)
        issue = self.issue
        issue.flags = VIA_TENSOR
        issue.proxy = TENSOR if issue.machine.tensor_fences else KNOWN
        issue.access(TensorMemory.of(cta).block, index, 1, self.entity, self.time, write, read)
        return index

    def shared(
        self, cta: Any, descriptor: SharedDescriptor, major: Literal["K", "MN"], rows: int, depth: int, bits: int
    ) -> NDArray[np.uint8]:
        """An operand in shared memory, read through the async proxy."""
        block = cta.shared
        base = block.base & 0xFFFFFF

        def fetch(where: NDArray[np.int64]) -> NDArray[np.uint8]:
            index = ((where & 0x3FFFF) - base) >> 4
            if int(index.min()) < 0 or int(index.max()) >= block.size // 16:
                raise Fault(
                    "out of bounds", f"the descriptor reaches outside {block.name} ({block.size} bytes)", int(where.min())
                )
            self.issue.flags, self.issue.proxy = VIA_ASYNC, ASYNC
            self.issue.access(block, np.unique(index), 16, self.entity, self.time, False)
            return np.asarray(block.view(8, 2)[index].view(np.uint8))

        return read_operand(descriptor, major, rows, depth, bits, fetch)

    def submit(self, name: str, run: Any, work: Work | None = None) -> None:
        def guarded() -> None:
            try:
                run()
            except ValueError as problem:
                self.issue.report("malformed descriptor", str(problem))
            except Fault as problem:
                self.issue.report(problem.kind, problem.message, f"{problem.address:#x}")

        stream: list[Operation] = self.warp.extra.setdefault("tcgen05 stream", [])
        stream[:] = [o for o in stream if not o.done]
        operation = Operation(name, self.issue.origin, guarded, [o for o in stream if _share(o.columns, self.columns)],
                              work)  # fmt: skip
        operation.columns = self.columns
        stream.append(operation)
        self.issue.machine.submit(operation)


def _descriptor(bits: int) -> SharedDescriptor:
    """A matrix descriptor; without swizzle the base offset has no pattern to shift, and compilers fill it in anyway."""
    return decode_tcgen05(bits & ~(7 << 49) if bits >> 61 == 0 else bits)


def _share(a: dict[int, int], b: dict[int, int]) -> bool:
    return any(bits & b.get(rank, 0) for rank, bits in a.items())


def _single(w: Split, context: Context) -> list[int]:
    """The threads that issue; there should be one."""
    lanes = np.flatnonzero(w.mask).tolist()
    if len(lanes) > 1:
        w.warp.cta.machine.monitor.report("tensor core misuse", f"{len(lanes)} threads issue what one thread should",
                                          Issue(w, context).origin)  # fmt: skip
    return lanes


@dataclass
class _Mma:
    """Operands of one tcgen05.mma instruction, as rows."""

    kind: str
    group: int
    vector: str
    d: Any
    a: int | None
    a_tensor: Any
    b: int
    idesc: int
    scale_a: Any
    scale_b: Any
    enable: tuple[int, bool]
    scale_d: int
    disable: list[int]
    stationary: bool


def multiply(context: Context, mods: Modifiers, group: int, stationary: bool = False) -> Step:
    """tcgen05.mma, after its cta_group."""
    if group == 2 and stationary:
        raise mods.fail(".ws is for one CTA")
    kind = mods.choice(_KINDS).removeprefix("kind::")
    scaled = mods.take("block_scale")
    vector = mods.choice(_VECTORS, "") if scaled else ""
    if mods.take("ashift"):
        raise mods.fail(".ashift is not")
    collector = mods.choice(_COLLECTORS, "")
    if scaled != (kind in BLOCK_SCALED) or (scaled and stationary):
        raise mods.fail()
    if collector and ("::a::" in collector) == stationary:
        raise mods.fail(f".{collector} is not for this form")
    form = _operands(context, kind, group, vector, scaled, stationary)

    def step(w: Split) -> None:
        memory = TensorMemory.of(w.warp.cta)
        if memory.group not in (0, group):
            Issue(w, context).report(
                "tensor memory misuse", f"cta_group::{group} in a kernel that also uses cta_group::{memory.group}"
            )
        if group == 2 and len(w.warp.cta.cluster.ctas) < 2:
            Issue(w, context).report("tensor memory misuse", "cta_group::2 needs a cluster with pairs of CTAs")
            return
        memory.group = group
        for lane in _single(w, context):
            _issue(w, context, form, lane)

    return step


def _operands(context: Context, kind: str, group: int, vector: str, scaled: bool, stationary: bool) -> _Mma:
    operands: list[Operand] = list(context.operands(5, 8))
    d = addresses(context.address(operands.pop(0)))
    first = operands.pop(0)
    a = None if isinstance(first, Address) else context.source(first, "b64")
    a_tensor = addresses(context.address(first)) if isinstance(first, Address) else None
    b, idesc = context.source(operands.pop(0), "b64"), context.source(operands.pop(0), "b32")
    scale_a = scale_b = None
    disable: list[int] = []
    if scaled:
        scale_a, scale_b = (addresses(context.address(operands.pop(0))) for _ in range(2))
    elif isinstance(operands[0], Vector) and not stationary:
        disable = [context.source(o, "b32") for o in context.vector(operands.pop(0), 4 * group)]
    enable = context.predicate(operands.pop(0))
    if stationary and operands:
        raise context.error("a mask of zero columns is not modelled")
    scale_d = context.literal(operands.pop(0)) if operands and not scaled else 0
    if operands:
        raise context.error("too many operands")
    if scale_d and (kind not in ("f16", "tf32") or not 0 <= scale_d <= 15):
        raise context.error(f"scale-input-d {scale_d} is not possible for kind::{kind}")
    return _Mma(kind, group, vector, d, a, a_tensor, b, idesc, scale_a, scale_b, enable, scale_d, disable, stationary)


def _at(w: Split, place: Any, lane: int) -> int:
    """One lane's address, 32 bits."""
    position = int(np.count_nonzero(w.mask[:lane]))
    return int(place(w)[position]) & 0xFFFFFFFF


def _issue(w: Split, context: Context, form: _Mma, lane: int) -> None:
    r = w.r[U]
    stream = _Stream(w, context, lane, form.group)
    try:
        instruction = decode_instruction(int(r[form.idesc][lane]), form.kind, form.group, form.vector, form.stationary)
        b = _descriptor(int(r[form.b][lane]))
        a = None if form.a is None else _descriptor(int(r[form.a][lane]))
        product = _Product(stream, instruction, form.group, a, b)
        product.place(w, form, lane)
    except ValueError as problem:
        stream.issue.report("malformed descriptor", str(problem))
        return
    product.accumulate = bool(r[form.enable[0]][lane]) ^ form.enable[1]
    product.scale_d = form.scale_d
    product.disabled = [int(r[row][lane]) for row in form.disable]
    if product.allocated:
        stream.submit("tcgen05.mma", product.run, product.work() if stream.issue.machine.recorder is not None else None)
    else:  # it is not done, but what orders it after the last use of its columns is looked at
        for cta in stream.ctas:
            stream.tensor(cta, product.d_cells, True)


class _Product:
    """One tcgen05.mma: its instruction descriptor, operands, and where D and the scales lie."""

    def __init__(
        self, stream: _Stream, instruction: InstructionDescriptor, group: int, a: SharedDescriptor | None, b: SharedDescriptor
    ) -> None:
        self.stream = stream
        self.i = instruction
        self.group = group
        self.a = a
        self.b = b
        self.a_cells: Cells | None = None
        self.accumulate = False
        self.scale_d = 0
        self.disabled: list[int] = []
        self.allocated = True
        self.scales: tuple[Any, Any] | None = None

    def place(self, w: Split, form: _Mma, lane: int) -> None:
        """Cells of tensor memory; raises ValueError for malformed addresses."""
        i, group = self.i, self.group
        self.d_cells = accumulator_cells(_at(w, form.d, lane), i.m, i.n, group, i.stationary)
        cells = [self.d_cells]
        if form.a_tensor is not None:
            if i.stationary and i.m < 128:
                raise ValueError(f"A in tensor memory for .ws with M {i.m} is not modelled: figures alone show where it lies")
            self.a_cells = operand_cells(_at(w, form.a_tensor, lane), i.m, group, OPERAND_BYTES // 4)
            cells.append(self.a_cells)
        if i.scales:
            n = i.n // 2 if is_split(i.m, group) else i.n
            self.scales = (
                scale_cells(_at(w, form.scale_a, lane), i.m // group, i.scales, i.a_scale_id),
                scale_cells(_at(w, form.scale_b, lane), n, i.scales, i.b_scale_id),
            )
            cells += [Cells(s.lanes, s.columns) for s in self.scales]
        for cta in self.stream.ctas:
            for part in cells:
                self.allocated &= self.stream.uses(cta, part)

    def values(
        self, cta: Any, descriptor: SharedDescriptor, major: Literal["K", "MN"], rows: int, kind: str
    ) -> NDArray[np.float64]:
        storage = storage_bits(self.i.kind, kind)
        return decode_operand(self.stream.shared(cta, descriptor, major, rows, self.i.k, storage), kind, storage)

    def operand_a(self, cta: Any) -> NDArray[np.float64]:
        """[copies, rows, K] of one CTA."""
        i = self.i
        if self.a is not None:
            return self.values(cta, self.a, i.a_major, i.m // self.group, i.a_type)[None]
        assert self.a_cells is not None
        words = TensorMemory.of(cta).cells[self.stream.tensor(cta, self.a_cells, False)]
        packed = [np.ascontiguousarray(part).view(np.uint8) for part in words]
        if i.a_type in ("e2m1", "e2m3", "e3m2") and i.kind in ("f8f6f4", "mxf8f6f4"):
            return np.stack([decode_containers(part, i.a_type) for part in packed])
        return np.stack([decode_operand(part, i.a_type, storage_bits(i.kind, i.a_type)) for part in packed])

    def scale(self, cta: Any, which: int) -> NDArray[np.float64] | None:
        if self.scales is None:
            return None
        cells = self.scales[which]
        words = TensorMemory.of(cta).cells[self.stream.tensor(cta, Cells(cells.lanes, cells.columns), False)]
        return read_scales(words, cells.byte, cells.scales, self.i.scale_type)

    def work(self) -> Work:
        i, columns = self.i, self.d_cells.columns
        text = f"tcgen05.mma {i.kind} {i.m}x{i.n}x{i.k}, D in columns {int(columns.min())} to {int(columns.max())}"
        return Work("MMA (tcgen05)", macs=i.m * i.n * i.k, ctas=tuple(self.stream.ctas), product=i.kind, text=text)

    def run(self) -> None:
        i, group = self.i, self.group
        b = np.concatenate([self.values(cta, self.b, i.b_major, i.n // group, i.b_type) for cta in self.stream.ctas])
        for rank, cta in enumerate(self.stream.ctas):
            memory = TensorMemory.of(cta)
            a = self.operand_a(cta)
            scale_a, scale_b = self.scale(cta, 0), self.scale(cta, 1)
            index = self.stream.tensor(cta, self.d_cells, True, self.accumulate)
            old = None
            if self.accumulate:
                words = memory.cells[index]
                wide = _WORDS.get(i.d_type)
                old = np.ascontiguousarray(words).view(wide) if wide else words.astype(np.uint16).view(np.float16)
            lanes = np.broadcast_to(
                self.d_cells.lanes, np.broadcast_shapes(self.d_cells.lanes.shape, self.d_cells.columns.shape)
            )
            new = tcgen05_multiply(i, lanes, a, b, old, scale_a, scale_b, self.scale_d)
            words = new.view(np.uint32) if i.d_type in _WORDS else new.view(np.uint16).astype(np.uint32)
            if self.disabled:
                mask = self.disabled[4 * rank : 4 * rank + 4]
                kept = np.array([mask[lane // 32] >> lane % 32 & 1 for lane in range(128)], dtype=bool)[lanes]
                words = np.where(kept, memory.cells[index], words)
            memory.cells[index] = words


def copy(context: Context, mods: Modifiers, group: int) -> Step:
    """tcgen05.cp: shared memory to tensor memory of each CTA of the group."""
    before = mods.choice(_CP_MULTICASTS, "")
    shape = mods.choice(_CP_SHAPES)
    after = mods.choice(_CP_MULTICASTS, "")
    unpacks = mods.take("b8x16")
    if unpacks and mods.choice(("b6x16_p32", "b4x16_p64")) == "b4x16_p64":
        raise mods.fail("figures alone show where decompression puts four bits")
    multicast = before or after
    try:
        cp_cells(0, shape, multicast)
    except ValueError as problem:
        raise mods.fail(str(problem)) from None
    operands = context.operands(2)
    to, source = addresses(context.address(operands[0])), context.source(operands[1], "b64")

    def step(w: Split) -> None:
        TensorMemory.of(w.warp.cta).group = TensorMemory.of(w.warp.cta).group or group
        for lane in _single(w, context):
            stream = _Stream(w, context, lane, group)
            try:
                cells = cp_cells(_at(w, to, lane), shape, multicast)
                descriptor = _descriptor(int(w.r[U][source][lane]))
            except ValueError as problem:
                stream.issue.report("malformed descriptor", str(problem))
                continue
            if all(stream.uses(cta, cells) for cta in stream.ctas):
                _, rows, words = np.broadcast_shapes(cells.lanes.shape, cells.columns.shape)
                work = Work("tcgen05.cp", bytes=4 * rows * words * len(stream.ctas), ctas=tuple(stream.ctas))
                stream.submit("tcgen05.cp", lambda s=stream, c=cells, d=descriptor: _copy(s, c, d, unpacks), work)

    return step


def _copy(stream: _Stream, cells: Cells, descriptor: SharedDescriptor, unpacks: bool) -> None:
    rows, words = np.broadcast_shapes(cells.lanes.shape, cells.columns.shape)[1:]
    for cta in stream.ctas:
        data = stream.shared(cta, descriptor, "K", rows, words * 4, 8)
        if unpacks:  # 16 elements of 6 bits at the start of 16 bytes, each to the low bits of a byte
            data = unpack_sixteens(data, 6)
        index = stream.tensor(cta, cells, True)
        TensorMemory.of(cta).cells[index] = np.ascontiguousarray(data).view(np.uint32)[None]


def shift(context: Context, mods: Modifiers, group: int) -> Step:
    """tcgen05.shift.down."""
    if not mods.take("down"):
        raise mods.fail()
    to = addresses(context.address(context.operands(1)[0]))

    def step(w: Split) -> None:
        for lane in _single(w, context):
            stream = _Stream(w, context, lane, group)
            try:
                source, target = shift_cells(_at(w, to, lane))
            except ValueError as problem:
                stream.issue.report("tensor memory misuse", str(problem))
                continue
            if all(stream.uses(cta, target) for cta in stream.ctas):
                stream.submit("tcgen05.shift", lambda s=stream, a=source, b=target: _shift(s, a, b), Work("tcgen05.cp"))

    return step


def _shift(stream: _Stream, source: Cells, target: Cells) -> None:
    for cta in stream.ctas:
        cells = TensorMemory.of(cta).cells
        words = cells[index_of(source)].copy()
        cells[index_of(target)] = words
        # the first row is only written, the last only read, and those between both
        for part, rows, write, read in ((target, slice(0, 1), True, False), (target, slice(1, None), True, True),
                                        (source, slice(-1, None), False, False)):  # fmt: skip
            stream.tensor(cta, Cells(part.lanes[rows], part.columns[rows]), write, read)

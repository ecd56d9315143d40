"""sort_tokens: the choices of a router in the order of their experts, stable, and where each expert begins.

Device code, in CuTe DSL. A counting sort by one CTA. Each warp has neighbouring choices; it counts them by expert, in its own
row of a table in shared memory, 32 at a time: lanes of the same expert find each other (match), so that the count needs no
atomics, and a choice knows its place among equals. Sums over the table say where each warp's part of each expert begins; then
every choice is placed.

Of many choices a cluster of CTAs sorts its neighbouring shares in the same way; each reads from the others' shared memory how
many of every expert they have.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator

from glu4.backends.tokens.spec import MAX_KEYS, WARPS

Int32, Int64, Uint32 = cutlass.Int32, cutlass.Int64, cutlass.Uint32

_LANES = 32
_AHEAD = 8  # steps whose loads are under way at once
THREADS = _LANES * WARPS


@dsl_user_op
def load_remote(address: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """A word of the shared memory of a CTA of the cluster; `address` is of mapa."""
    result = llvm.inline_asm(
        T.i32(), [Uint32(address).ir_value(loc=loc, ip=ip)], "ld.shared::cluster.b32 $0, [$1];", "=r,r", has_side_effects=True,
        is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result)


class SortTokens:
    """Arguments at launch, device pointers: ids, `count` integers of `words` 32-bit words each; order and places int64 [count],
    each the inverse of the other; offsets int32 [experts + 1]. Then count; words, 1 or 2; experts, below MAX_KEYS.

    An id below 0 or of `experts` and above is of no expert: such choices come last, behind offsets[experts].
    """

    def __init__(self, ctas: int) -> None:
        self.ctas = ctas

    @cute.jit
    def __call__(
        self, ids: cute.Pointer, order: cute.Pointer, places: cute.Pointer, offsets: cute.Pointer, count: Int32, words: Int32,
        experts: Int32, stream: CUstream,
    ):  # fmt: skip
        self.kernel(ids, order, places, offsets, count, words, experts).launch(
            grid=(self.ctas, 1, 1), block=(THREADS, 1, 1), cluster=(self.ctas, 1, 1) if self.ctas > 1 else None, stream=stream,
            use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, ids: cute.Pointer, order: cute.Pointer, places: cute.Pointer, offsets: cute.Pointer, count: Int32, words: Int32,
        experts: Int32,
    ):  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        lane, warp = thread % _LANES, cute.arch.make_warp_uniform(thread // _LANES)
        memory = SmemAllocator()
        counts = memory.allocate_tensor(Int32, cute.make_layout((WARPS, MAX_KEYS), stride=(MAX_KEYS, 1)), byte_alignment=16)
        sums = memory.allocate_tensor(Int32, cute.make_layout(WARPS), byte_alignment=16)
        totals = None
        if cutlass.const_expr(self.ctas > 1):
            totals = memory.allocate_tensor(Int32, cute.make_layout(MAX_KEYS), byte_alignment=16)
        mine = counts[warp, None]
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        for key in cutlass.range(lane, experts + 1, _LANES, unroll=1):
            mine[key] = 0
        cute.arch.sync_warp()
        steps = cute.ceil_div(count, THREADS * self.ctas)  # of 32 choices, of each warp
        source = (ids.toint(), words, count, experts)
        first = (cta * WARPS + warp) * steps * _LANES + lane
        self.each(source, first, steps, mine, None, None)
        cute.arch.sync_threads()
        self.sum(counts, sums, totals, offsets, experts, cta, thread, lane, warp)
        cute.arch.sync_threads()
        self.each(source, first, steps, mine, order, places)
        if cutlass.const_expr(self.ctas > 1):
            cute.arch.cluster_wait()  # nobody reads this CTA's totals any more

    @cute.jit
    def each(self, source, first, steps, mine, order, places):
        """Count a warp's choices in `mine`, or, where counts have become places, write down each one's."""
        for begin in cutlass.range(0, steps, _AHEAD, unroll=1):
            keys = cute.make_rmem_tensor((_AHEAD,), Int32)
            for i in cutlass.range_constexpr(_AHEAD):
                keys[i] = self.key(source, first + (begin + i) * _LANES, begin + i < steps)
            for i in cutlass.range_constexpr(_AHEAD):
                if begin + i < steps:
                    key = keys[i]
                    same = Int32(cute.arch.match_sync(0xFFFFFFFF, key))
                    rank = Int32(cute.arch.popc(same & Int32(cute.arch.lanemask_lt())))
                    before = Int32(0)
                    if key >= 0:
                        before = mine[key]
                    cute.arch.sync_warp()
                    if (key >= 0) & (rank == 0):
                        mine[key] = before + Int32(cute.arch.popc(same))
                    cute.arch.sync_warp()
                    if cutlass.const_expr(order is not None):
                        if key >= 0:
                            item, place = first + (begin + i) * _LANES, before + rank
                            order[place] = Int64(item)
                            places[item] = Int64(place)

    @cute.jit
    def key(self, source, item, there):
        """The expert of a choice, `experts` for none, -1 where there is no such choice."""
        start, words, count, experts = source
        found = Int32(-1)
        if there & (item < count):
            place = cute.make_ptr(Uint32, start + Int64(item) * words * 4, cute.AddressSpace.gmem, assumed_align=4)
            both = cute.make_tensor(place, cute.make_layout(2))
            low, high = Uint32(both[0]), Uint32(0)
            if words == 2:
                high = Uint32(both[1])
            found = Int32(low) if (high == 0) & (low < Uint32(experts)) else experts
        return found

    @cute.jit
    def sum(self, counts, sums, totals, offsets, experts, cta, thread, lane, warp):
        """Turn counts into places: of each key behind all lower ones, and behind the same key of earlier CTAs and warps."""
        total, ahead = Int32(0), Int32(0)
        if thread <= experts:
            for w in cutlass.range(WARPS, unroll=8):
                total = total + counts[w, thread]
        if cutlass.const_expr(self.ctas > 1):
            totals[thread] = total
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            total = Int32(0)
            for other in cutlass.range_constexpr(self.ctas):
                theirs = cute.arch.map_dsmem_ptr(totals.iterator + thread, Int32(other))
                of_other = load_remote(theirs.toint())
                total = total + of_other
                ahead = ahead + of_other if other < cta else ahead
            cute.arch.cluster_arrive()
        upto = total
        for i in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(upto, 1 << i, mask_and_clamp=0)
            upto = upto + below if lane >= (1 << i) else upto
        if lane == _LANES - 1:
            sums[warp] = upto
        cute.arch.sync_threads()
        earlier = Int32(0)
        if lane < warp:
            earlier = sums[lane]
        start = upto - total + Int32(cute.arch.warp_redux_sync(earlier, kind="add"))
        if thread <= experts:
            if cta == 0:
                offsets[thread] = start
            start = start + ahead
            for w in cutlass.range(WARPS, unroll=8):
                own = counts[w, thread]
                counts[w, thread] = start
                start = start + own

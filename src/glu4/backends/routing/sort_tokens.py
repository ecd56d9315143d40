"""sort_tokens: the choices of a router in the order of their experts, stable, and where each expert begins.

Device code, in CuTe DSL. A counting sort by one CTA. Each warp has neighbouring choices; it counts them by expert, in its own
row of a table in shared memory, 32 at a time: lanes of the same expert find each other (match), so that the count needs no
atomics, and a choice knows its place among equals. Sums over the table say where each warp's part of each expert begins; then
every choice is placed.
"""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import cute
from cutlass.memory import SmemAllocator

from glu4.backends.routing.spec import MAX_KEYS, WARPS

Int32, Int64, Uint32 = cutlass.Int32, cutlass.Int64, cutlass.Uint32

_LANES = 32
_AHEAD = 8  # steps whose loads are under way at once
THREADS = _LANES * WARPS


class SortTokens:
    """Arguments at launch, device pointers: ids, `count` integers of `words` 32-bit words each; order and places int64 [count],
    each the inverse of the other; offsets int32 [experts + 1]. Then count; words, 1 or 2; experts, below MAX_KEYS.

    An id below 0 or of `experts` and above is of no expert: such choices come last, behind offsets[experts].
    """

    @cute.jit
    def __call__(
        self, ids: cute.Pointer, order: cute.Pointer, places: cute.Pointer, offsets: cute.Pointer, count: Int32, words: Int32,
        experts: Int32, stream: CUstream,
    ):  # fmt: skip
        self.kernel(ids, order, places, offsets, count, words, experts).launch(
            grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self, ids: cute.Pointer, order: cute.Pointer, places: cute.Pointer, offsets: cute.Pointer, count: Int32, words: Int32,
        experts: Int32,
    ):  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        lane, warp = thread % _LANES, cute.arch.make_warp_uniform(thread // _LANES)
        memory = SmemAllocator()
        counts = memory.allocate_tensor(Int32, cute.make_layout((WARPS, MAX_KEYS), stride=(MAX_KEYS, 1)), byte_alignment=16)
        sums = memory.allocate_tensor(Int32, cute.make_layout(WARPS), byte_alignment=16)
        mine = counts[warp, None]
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        for key in cutlass.range(lane, experts + 1, _LANES, unroll=1):
            mine[key] = 0
        cute.arch.sync_warp()
        steps = cute.ceil_div(count, THREADS)  # of 32 choices, of each warp
        source = (ids.toint(), words, count, experts)
        first = warp * steps * _LANES + lane
        self.each(source, first, steps, mine, None, None)
        cute.arch.sync_threads()
        self.sum(counts, sums, offsets, experts, thread, lane, warp)
        cute.arch.sync_threads()
        self.each(source, first, steps, mine, order, places)

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
    def sum(self, counts, sums, offsets, experts, thread, lane, warp):
        """Turn counts into places: of each key behind all lower ones, and behind the same key of earlier warps."""
        total = Int32(0)
        if thread <= experts:
            for w in cutlass.range(WARPS, unroll=8):
                total = total + counts[w, thread]
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
            offsets[thread] = start
            for w in cutlass.range(WARPS, unroll=8):
                own = counts[w, thread]
                counts[w, thread] = start
                start = start + own

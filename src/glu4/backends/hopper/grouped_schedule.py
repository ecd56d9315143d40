"""Which tile a CTA of the grouped kernel computes next: the same answer in every CTA, from `offsets` alone. Device code.

A twin in plain Python, `tests/grouped_twin.py`, says what the schedule is.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from glu4.backends.hopper.grouped_config import MAX_EXPERTS, GroupedConfig

Int32, Float32 = cutlass.Int32, cutlass.Float32

_SEARCH_STEPS = MAX_EXPERTS.bit_length() - 1
# what a tile costs beside its products, in tokens: decoding (as `config.cost` has it), starting, SiLU and stores
TILE_COST = 40.0


class Schedule:
    """Device functions; `config` says which widths there are."""

    def __init__(self, config: GroupedConfig) -> None:
        self.config = config
        self.warps = config.threads // 32
        self.expert_warps = config.max_experts // 32

    @cute.jit
    def clamped(self, offset, rows):
        return cutlass.min(cutlass.max(offset, 0), rows)

    @cute.jit
    def count(self, offsets, rows, expert):
        """An expert's tokens."""
        return cutlass.max(self.clamped(offsets[expert + 1], rows) - self.clamped(offsets[expert], rows), 0)

    @cute.jit
    def width(self, count, tiles):
        """(the narrowest width that holds an even share of `count` tokens, its place among the widths from 1, 0 for none)."""
        share = (count + tiles - 1) // cutlass.max(tiles, 1)
        width, place = Int32(0), Int32(0)
        for v in cutlass.range_constexpr(len(self.config.widths)):
            below = Int32(self.config.widths[v - 1]) if cutlass.const_expr(v > 0) else Int32(0)
            wide = share > below
            width = Int32(self.config.widths[v]) if wide else width
            place = Int32(v + 1) if wide else place
        return width, place

    @cute.jit
    def compute(self, offsets, rows, row_tiles, ctas, starts, order, scratch, thread):
        """Fill `order`, the experts by width, widest first and in order of index among equals, and `starts`: the token tiles of
        all before each of these, and last of all. One thread an expert."""
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        experts = offsets.shape[0] - 1
        count = Int32(0)
        if thread < experts:
            count = self.count(offsets, rows, thread)
        most = self.most_tokens(count, row_tiles, ctas, scratch, lane, warp)
        tiles = (count + most - 1) // most
        _, place = self.width(count, tiles)
        rank = self.rank(place, thread < experts, scratch, lane, warp)
        if thread < experts:
            order[rank] = thread
            starts[rank + 1] = tiles
        cute.arch.sync_threads()
        # token tiles of all experts up to each
        total = Int32(0)
        if thread < experts:
            total = starts[thread + 1]
        for i in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(total, 1 << i, mask_and_clamp=0)
            total = total + below if lane >= (1 << i) else total
        if lane == 31:
            scratch[0, warp] = total
        cute.arch.sync_threads()
        for w in cutlass.range_constexpr(self.warps):
            total = total + scratch[0, w] if w < warp else total
        if thread < experts:
            starts[thread + 1] = total
        if thread == 0:
            starts[0] = 0
        cute.arch.sync_threads()

    @cute.jit
    def most_tokens(self, count, row_tiles, ctas, scratch, lane, warp):
        """The choice with the shortest predicted schedule: rounds of tiles times the mean tile."""
        choices = self.config.choices
        for i in cutlass.range_constexpr(len(choices)):
            tiles = (count + (choices[i] - 1)) // choices[i]
            width, _ = self.width(count, tiles)
            scratch[2 * i, warp] = cute.arch.warp_redux_sync(tiles, kind="add")
            scratch[2 * i + 1, warp] = cute.arch.warp_redux_sync(tiles * width, kind="add")
        cute.arch.sync_threads()
        best, least = Int32(choices[0]), Float32(0.0)
        for i in cutlass.range_constexpr(len(choices)):
            all_tiles, all_tokens = self.total(scratch, 2 * i, lane), self.total(scratch, 2 * i + 1, lane)
            rounds = (all_tiles * row_tiles + ctas - 1) // ctas
            cost = Float32(rounds) * (Float32(all_tokens) / Float32(cutlass.max(all_tiles, 1)) + TILE_COST)
            if cutlass.const_expr(i == 0):
                least = cost
            else:
                better = cost < least
                best, least = Int32(choices[i]) if better else best, cost if better else least
        cute.arch.sync_threads()
        return best

    @cute.jit
    def total(self, scratch, item, lane):
        """The sum of what every warp with experts left under `item`."""
        mine = Int32(0)
        if lane < self.expert_warps:
            mine = scratch[item, lane]
        return cute.arch.warp_redux_sync(mine, kind="add")

    @cute.jit
    def rank(self, place, there, scratch, lane, warp):
        """How many experts come before this one: those with a wider tile, then those of the same width and a lower index."""
        places = cutlass.const_expr(len(self.config.widths) + 1)
        before = Int32(0)  # in this warp
        for p in cutlass.range_constexpr(places):
            mask = cute.arch.vote_ballot_sync((place == p) & there)
            inside = Int32(cute.arch.popc(mask & Int32(cute.arch.lanemask_lt())))
            before = inside if place == p else before
            scratch[p, warp] = Int32(cute.arch.popc(mask))
        cute.arch.sync_threads()
        # lane p: experts of width p in warps before this one, and in all
        earlier, wider = Int32(0), Int32(0)
        if lane < places:
            for w in cutlass.range_constexpr(self.expert_warps):
                there_are = scratch[lane, w]
                wider = wider + there_are
                earlier = earlier + there_are if w < warp else earlier
        # of width p and wider, then wider alone
        own = wider
        for i in cutlass.range_constexpr(4):
            above = cute.arch.shuffle_sync_down(wider, 1 << i)
            wider = wider + above if lane + (1 << i) < 32 else wider
        first = wider - own + earlier
        cute.arch.sync_threads()
        return before + cute.arch.shuffle_sync(first, place)

    @cute.jit
    def tile(self, turn):
        """This CTA's tile in a round: from the first CTA to the last in even ones, from the last to the first in odd ones."""
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        place = ctas - 1 - cta if turn % 2 == 1 else cta
        return turn * ctas + place

    @cute.jit
    def locate(self, starts, order, offsets, rows, experts, row_tiles, tile):
        """(expert, row tile, first token, end of tokens, width) of a tile."""
        at = tile // row_tiles
        low, high = Int32(0), Int32(experts)
        for _ in cutlass.range_constexpr(_SEARCH_STEPS):
            middle = (low + high) // 2
            below = starts[middle] <= at
            low, high = middle if below else low, high if below else middle
        first = starts[low]
        count = starts[low + 1] - first
        inside = tile - first * row_tiles
        expert = order[low]
        begin = self.clamped(offsets[expert], rows)
        tokens = self.count(offsets, rows, expert)
        width, _ = self.width(tokens, count)
        start = begin + inside % count * width
        return expert, inside // count, start, cutlass.min(begin + tokens, start + width), width

"""What each CTA of the grouped kernel computes: the same answer in every CTA, from `offsets` alone. Device code.

Tiles of an expert lie row tile by row tile, the token tiles of one beside each other, and experts by the width of their tiles,
widest first. As long as more than two rounds of tiles are left, every CTA takes a whole one. The rest is one line of work, cut
into equal parts wherever a cut falls: a tile that several CTAs share is finished by the last of them, which adds the others'
sums in a fixed order. A CTA begins with the piece that another finishes, so that sums lie ready when they are asked for. Where
whole tiles would take hardly longer, there are rounds of them to the end.

A twin in plain Python, `tests/grouped_twin.py`, says what the schedule is.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from glu4.backends.hopper.grouped_config import FINISH_STEPS, FIT_EXPERTS, STEP_COST, GroupedConfig
from glu4.backends.hopper.instructions import load_relaxed

Int32, Int64, Uint32 = cutlass.Int32, cutlass.Int64, cutlass.Uint32

_WARP, _BLOCK = 32, 16  # experts looked at in one step of a search: each 16th, then 16
_SUMS = 1  # barrier of the warps that have experts
# words of `plan`: rounds of whole tiles; where this CTA's part of the rest begins and ends: tile, step; tiles; whether all work
# fits, and then this CTA's tile: expert, first row group, first token, end, width, row groups; whether the offsets have changed
PLAN_WORDS = 14
_TILES, _FITS, _FIT_WORDS, _STALE = 5, 6, 6, 13


class Schedule:
    """Device functions on five arrays in shared memory, int32: `starts` and `costs` [experts + 1], the token tiles, and their
    cost, of all experts before each in the order of work; `order` [experts], expert + width * 2^16 in that order; `bounds`
    [experts + 1], the offsets, clamped; `plan`."""

    def __init__(self, config: GroupedConfig) -> None:
        self.config = config

    @cute.jit
    def read(self, offsets, thread):
        """(an expert's first offset, the next), as they are now: of expert `thread`, or of those that `fit` looks at."""
        experts = offsets.shape[0] - 1
        expert = self.looked_at(thread, experts)
        first, last = Int32(0), Int32(0)
        if expert < experts:
            address = offsets.iterator.toint() + expert.to(Int64) * 4
            first, last = load_relaxed(address), load_relaxed(address + 4)
        return first, last

    @cute.jit
    def looked_at(self, thread, experts):
        """The expert whose offsets a thread reads."""
        expert = Int32(thread)
        if cutlass.const_expr(self.config.fit):
            # the last warp fits: few experts, which are threads of the first
            lane = thread - cutlass.const_expr(self.config.threads - _WARP)
            expert = lane if (lane >= 0) & (experts <= FIT_EXPERTS) else expert
        return expert

    @cute.jit
    def fill(self, own, experts, rows, starts, costs, order, bounds, plan, scratch, outputs, row_tiles, steps, thread):
        """Fill all arrays; where tiles fit, `plan` says so and all is in it. All threads of the CTA, each with what `read` gave
        it. `outputs`: row groups."""
        if cutlass.const_expr(self.config.fit):
            if thread >= cutlass.const_expr(self.config.threads - _WARP):
                self.fit(own, experts, rows, plan, outputs, steps, thread % _WARP)
        self.compute(own, experts, rows, starts, costs, order, bounds, scratch, thread)
        if cutlass.const_expr(self.config.fit):
            if plan[_FITS] == 0:
                self.divide(starts, costs, order, plan, experts, row_tiles, steps, thread)
        else:
            self.divide(starts, costs, order, plan, experts, row_tiles, steps, thread)

    @cute.jit
    def assume(self, plan, thread):
        """Begin with what `read` finds, before the kernel in front has ended, which may write offsets. Before `fill`."""
        if thread == 0:
            plan[_STALE] = 0

    @cute.jit
    def changed(self, offsets, plan, own, thread):
        """(whether `read` finds anything else by now, what it finds). All threads of the CTA."""
        now = self.read(offsets, thread)
        if (now[0] != own[0]) | (now[1] != own[1]):
            plan[_STALE] = 1
        cute.arch.sync_threads()
        return plan[_STALE] == 1, now

    @cute.jit
    def compute(self, own, experts, rows, starts, costs, order, bounds, scratch, thread):
        """Fill the arrays but for `plan`; one thread an expert, which has its offsets. `scratch`: [notes, warps] words."""
        lane, warp = thread % _WARP, cute.arch.make_warp_uniform(thread // _WARP)
        warps = (experts + (_WARP - 1)) // _WARP
        if warp < warps:
            there = thread < experts
            begin, count = Int32(0), Int32(0)
            if there:
                begin = self.clamped(own[0], rows)
                end = self.clamped(own[1], rows)
                count = cutlass.max(end - begin, 0)
                bounds[thread] = begin
                if thread == experts - 1:
                    bounds[experts] = end
            most = cutlass.const_expr(self.config.tokens)
            tiles = (count + (most - 1)) // most
            # of a tile's products: its tokens, shared out in grains
            grain = cutlass.const_expr(self.config.grain)
            each = Uint32(cutlass.max(tiles * grain, 1))
            place = Int32((Uint32(count) + (each - 1)) // each)
            width = place * grain
            rank = self.rank(place, there, scratch, lane, warp, warps)
            if there:
                order[rank] = thread | (width << 16)
                starts[rank + 1] = tiles
            cute.arch.barrier(barrier_id=_SUMS, number_of_threads=warps * _WARP)
            tiles, cost = Int32(0), Int32(0)
            if there:
                tiles = starts[thread + 1]
                cost = tiles * ((order[thread] >> 16) + STEP_COST)
            for i in cutlass.range_constexpr(5):
                tiles_below = cute.arch.shuffle_sync_up(tiles, 1 << i, mask_and_clamp=0)
                cost_below = cute.arch.shuffle_sync_up(cost, 1 << i, mask_and_clamp=0)
                tiles = tiles + tiles_below if lane >= (1 << i) else tiles
                cost = cost + cost_below if lane >= (1 << i) else cost
            if warps > 1:
                if lane == _WARP - 1:
                    scratch[0, warp] = tiles
                    scratch[1, warp] = cost
                cute.arch.barrier(barrier_id=_SUMS, number_of_threads=warps * _WARP)
                tiles_before, cost_before = Int32(0), Int32(0)
                if lane < warp:
                    tiles_before = scratch[0, lane]
                    cost_before = scratch[1, lane]
                tiles = tiles + cute.arch.warp_redux_sync(tiles_before, kind="add")
                cost = cost + cute.arch.warp_redux_sync(cost_before, kind="add")
            if there:
                starts[thread + 1] = tiles
                costs[thread + 1] = cost
            if thread == 0:
                starts[0] = 0
                costs[0] = 0
        cute.arch.sync_threads()

    @cute.jit
    def clamped(self, offset, rows):
        return cutlass.min(cutlass.max(offset, 0), rows)

    @cute.jit
    def rank(self, place, there, scratch, lane, warp, warps):
        """How many experts come before this one: those with a wider tile, then those of the same width and a lower index."""
        places = cutlass.const_expr(len(self.config.widths) + 1)
        # lanes with a wider tile, with one as wide: bit by bit
        wider, same = Int32(0), Int32(cute.arch.vote_ballot_sync(there))
        for bit in cutlass.range_constexpr((places - 1).bit_length() - 1, -1, -1):
            mine = (place >> bit) & 1
            mask = Int32(cute.arch.vote_ballot_sync((mine == 1) & there))
            wider = wider if mine == 1 else wider | (same & mask)
            same = same & mask if mine == 1 else same & ~mask
        before = Int32(cute.arch.popc(same & Int32(cute.arch.lanemask_lt())))
        rank = before + Int32(cute.arch.popc(wider))
        if warps > 1:
            for p in cutlass.range_constexpr(places):
                scratch[p, warp] = Int32(cute.arch.popc(cute.arch.vote_ballot_sync((place == p) & there)))
            cute.arch.barrier(barrier_id=_SUMS, number_of_threads=warps * _WARP)
            # lane p: experts of width p in warps before this one, and in all
            earlier, own = Int32(0), Int32(0)
            if lane < places:
                for w in cutlass.range(warps, unroll=4):
                    there_are = scratch[lane, w]
                    own = own + there_are
                    earlier = earlier + there_are if w < warp else earlier
            # of width p and wider, then wider alone
            wider = own
            for i in cutlass.range_constexpr((places - 1).bit_length()):
                above = cute.arch.shuffle_sync_down(wider, 1 << i)
                wider = wider + above if lane + (1 << i) < _WARP else wider
            first = wider - own + earlier
            # the notes are free for others once all have read them
            cute.arch.barrier(barrier_id=_SUMS, number_of_threads=warps * _WARP)
            rank = before + cute.arch.shuffle_sync(first, place)
        return rank

    # ---- who does what ----

    @cute.jit
    def fit(self, own, experts, rows, plan, groups, steps, lane):
        """Look for tiles of 2 and 3 row groups, one a CTA, of which none costs more than need be; fill `plan` where there are.
        By a warp, which needs no other's work: it looks while `compute` goes on.

        Each lane has a limit of its own for what a tile may cost, which says how wide tiles may be; the lowest with which all
        tiles find a CTA is taken. Then each lane has an expert of its own.
        """
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        c = self.config
        mask, narrow, wide = Int32(0), Int32(1), Int32(1)
        begin, count = Int32(0), Int32(0)
        tall_tiles, low_tiles = (groups + 2) // 3, (groups + 1) // 2
        if experts <= FIT_EXPERTS:
            if lane < experts:
                begin = self.clamped(own[0], rows)
                count = cutlass.max(self.clamped(own[1], rows) - begin, 0)
            limit = (lane + 1) * cutlass.const_expr(-(-3 * (STEP_COST + c.tokens) // _WARP))
            narrow = cutlass.min(limit // 3 - STEP_COST, c.tokens) // c.grain * c.grain
            wide = cutlass.min(limit // 2 - STEP_COST, c.tokens) // c.grain * c.grain
            tiles = Int32(0)
            for e in cutlass.range(experts, unroll=1):
                its_count = cute.arch.shuffle_sync(count, e)
                if narrow > 0:
                    low, tall = self.bands(its_count, narrow, wide, tall_tiles, low_tiles)
                    tiles += low * low_tiles + tall * tall_tiles
            mask = Int32(cute.arch.vote_ballot_sync((narrow > 0) & (tiles <= ctas)))
        if lane == 0:
            plan[_FITS] = Int32(1) if mask != 0 else Int32(0)
        if mask != 0:
            chosen = Int32(cute.arch.popc((mask & -mask) - 1))
            narrow, wide = cute.arch.shuffle_sync(narrow, chosen), cute.arch.shuffle_sync(wide, chosen)
            low, tall = self.bands(count, narrow, wide, tall_tiles, low_tiles)
            mine = low * low_tiles + tall * tall_tiles
            until = mine
            for i in cutlass.range_constexpr((FIT_EXPERTS - 1).bit_length()):
                below = cute.arch.shuffle_sync_up(until, 1 << i, mask_and_clamp=0)
                until = until + below if lane >= (1 << i) else until
            inside = cta - (until - mine)
            if lane == 0:
                for i in cutlass.range_constexpr(_FITS):
                    plan[i] = 1 if cutlass.const_expr(i == _TILES) else 0
                for i in cutlass.range_constexpr(_FIT_WORDS):
                    plan[_FITS + 1 + i] = 0  # no tile
            cute.arch.sync_warp()
            if (inside >= 0) & (inside < mine):
                # tokens of low tiles come first
                of_low = cutlass.min(cutlass.max(count - tall * narrow + (c.grain - 1), 0) // c.grain * c.grain, count)
                is_low = inside < low * low_tiles
                inside = inside if is_low else inside - low * low_tiles
                bands = low if is_low else tall
                first, end = Int32(0) if is_low else of_low, of_low if is_low else count
                row_tile = Int32(Uint32(inside) // Uint32(bands))
                band = inside - row_tile * bands
                grains = (end - first + (c.grain - 1)) // c.grain
                each = Int32(Uint32(grains) // Uint32(bands))
                more = grains - each * bands
                first += (band * each + cutlass.min(band, more)) * c.grain
                width = (each + 1 if band < more else each) * c.grain
                plan[4] = steps if width > 0 else 0
                plan[_FITS + 1] = lane
                plan[_FITS + 2] = row_tile * (2 if is_low else 3)
                plan[_FITS + 3] = begin + first
                plan[_FITS + 4] = begin + cutlass.min(first + width, end)
                plan[_FITS + 5] = width
                plan[_FITS + 6] = 2 if is_low else 3

    @cute.jit
    def bands(self, count, narrow, wide, tall_tiles, low_tiles):
        """(tiles beside each other of 2 row groups and up to `wide` tokens, of 3 and up to `narrow`) that hold `count` tokens
        and take the fewest CTAs."""
        count = cutlass.max(count, 0)
        low = Int32(Uint32(count + (wide - 1)) // Uint32(wide))
        tall = Int32(0)
        fewest = low * low_tiles
        for number in cutlass.range_constexpr(1, 5):
            rest = cutlass.max(count - number * narrow, 0)
            here = Int32(Uint32(rest + (wide - 1)) // Uint32(wide))
            if here * low_tiles + number * tall_tiles < fewest:
                fewest = here * low_tiles + number * tall_tiles
                low, tall = here, Int32(number)
        return low, tall

    @cute.jit
    def divide(self, starts, costs, order, plan, experts, row_tiles, steps, thread):
        """Fill `plan`. All threads, after `compute`."""
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(thread // _WARP)
        if warp < 2:
            tiles = starts[experts] * row_tiles
            kept, from_tile, _, shared = self.rest(starts, costs, order, experts, row_tiles, ctas)
            tile, step, rounds = tiles, Int32(0), kept
            if self.worth_it(starts, order, experts, row_tiles, steps, ctas, from_tile, shared):
                tile, step = self.cut(starts, costs, order, experts, row_tiles, steps, cta + warp)
            else:
                rounds = (tiles + (ctas - 1)) // ctas
            if thread % _WARP == 0:
                plan[1 + 2 * warp] = tile
                plan[2 + 2 * warp] = step
            if thread == 0:
                plan[0] = rounds
                plan[_TILES] = tiles
        cute.arch.sync_threads()

    @cute.jit
    def cost(self, order, place):
        """Of a step along K of a tile, in tokens."""
        return (order[place] >> 16) + STEP_COST

    @cute.jit
    def rest(self, starts, costs, order, experts, row_tiles, ctas):
        """(full rounds before the work that can be shared, all but two; its first tile; the cost of all before, of all in it).

        A cost is of one step along K of all tiles, and relative: what lies before may be too much for 32 bits.
        """
        tiles = starts[experts] * row_tiles
        kept, origin = Int32(0), Int32(0)
        if tiles > 2 * ctas:
            kept = Int32(Uint32(tiles + (ctas - 1)) // Uint32(ctas)) - 2
            at = self.search(starts, row_tiles, kept * ctas, experts)
            origin = costs[at] * row_tiles + (kept * ctas - starts[at] * row_tiles) * self.cost(order, at)
        return kept, kept * ctas, origin, costs[experts] * row_tiles - origin

    @cute.jit
    def worth_it(self, starts, order, experts, row_tiles, steps, ctas, from_tile, shared):
        """Whether the widest and the narrowest of the last two rounds, or the one of the last round, take longer than an equal
        part of the work and the exchange of sums."""
        tiles = starts[experts] * row_tiles
        whole = Int32(0)
        if tiles > 0:
            whole = self.cost(order, self.search(starts, row_tiles, from_tile, experts))
            if tiles - from_tile > ctas:
                whole += self.cost(order, self.search(starts, row_tiles, tiles - 1, experts))
        exchange = cutlass.const_expr(self.config.share // self.config.rows)
        return (whole * ctas - shared) * steps > exchange * ctas

    @cute.jit
    def cut(self, starts, costs, order, experts, row_tiles, steps, number):
        """(tile, step) at which part `number` of the shared work begins; past the last part the end. By a whole warp."""
        ctas, _, _ = cute.arch.grid_dim()
        tiles = starts[experts] * row_tiles
        _, from_tile, origin, shared = self.rest(starts, costs, order, experts, row_tiles, ctas)
        # a short piece costs more than it saves
        least = cutlass.const_expr(self.config.least)
        parts = cutlass.min(ctas, cutlass.max((tiles - from_tile) * steps // least, 1))
        place = shared * number
        low = self.search_cost(starts, costs, row_tiles, from_tile, origin, parts, place, experts)
        begin = starts[low] * row_tiles
        each = Uint32(self.cost(order, low) * parts)
        passed = cutlass.max(costs[low] * row_tiles - origin, 0) if begin >= from_tile else Int32(0)
        left = Uint32(place - passed * parts)
        tile = left // each
        # finishing a tile counts as steps at its end
        step = Int32((left - tile * each) * Uint32(steps + FINISH_STEPS) // each)
        tile = Int32(tile) + cutlass.max(begin, from_tile)
        late = step > cutlass.max(steps - least, steps // 2)
        tile = tile + 1 if late else tile
        step = Int32(0) if late | (step < least) else step
        over = (number >= parts) | (tile >= tiles)
        return tiles if over else tile, Int32(0) if over else step

    @cute.jit
    def search(self, starts, row_tiles, tile, experts):
        """The last expert, in the order of work, whose tiles begin at `tile` or before."""
        at = Int32(Uint32(tile) // Uint32(row_tiles))
        lane = cute.arch.lane_idx()
        block = Int32(0)
        for half in cutlass.range_constexpr(2):
            index = lane * _BLOCK if cutlass.const_expr(half == 0) else block + lane % _BLOCK
            begins = Int32(0)
            if index < experts:
                begins = Int32(1) if starts[index] <= at else Int32(0)
            mask = cute.arch.vote_ballot_sync(begins == 1)
            if cutlass.const_expr(half == 0):
                block = (Int32(cute.arch.popc(mask)) - 1) * _BLOCK
            else:
                block += Int32(cute.arch.popc(mask & Int32(0xFFFF))) - 1
        return block

    @cute.jit
    def search_cost(self, starts, costs, row_tiles, from_tile, origin, parts, place, experts):
        """The last expert whose part of the shared work begins at `place` (cost times parts) or before."""
        lane = cute.arch.lane_idx()
        block = Int32(0)
        for half in cutlass.range_constexpr(2):
            index = lane * _BLOCK if cutlass.const_expr(half == 0) else block + lane % _BLOCK
            begins = Int32(0)
            if index < experts:
                early = starts[index] * row_tiles <= from_tile
                early = early | ((costs[index] * row_tiles - origin) * parts <= place)
                # those without tiles come last, and begin where all ends
                early = early & (starts[index] < starts[experts])
                begins = Int32(1) if early else Int32(0)
            mask = cute.arch.vote_ballot_sync(begins == 1)
            if cutlass.const_expr(half == 0):
                block = (cutlass.max(Int32(cute.arch.popc(mask)), 1) - 1) * _BLOCK
            else:
                block += cutlass.max(Int32(cute.arch.popc(mask & Int32(0xFFFF))), 1) - 1
        return block

    @cute.jit
    def ahead(self, plan, steps, stages):
        """(steps that can be on their way before any is taken, the tile that they are of, its first step)."""
        tile, first, end = self.piece(plan, 0, steps)
        if (first >= end) & (self.turns(plan) > 1):
            tile, first, end = self.piece(plan, 1, steps)
        return cutlass.min(cutlass.max(end - first, 0), stages), tile, first

    @cute.jit
    def turns(self, plan):
        """Pieces of this CTA, the first of which may be empty."""
        return 1 + plan[0] + plan[3] - plan[1]

    @cute.jit
    def piece(self, plan, turn, steps):
        """(tile, first step, end) of a turn: what another CTA finishes, whole tiles, at last what this one finishes.

        In the rounds of whole tiles the CTAs take turns from first to last and back, so that who had a wide one gets a narrow
        one next.
        """
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        kept, from_tile, from_step, to_tile, to_step = plan[0], plan[1], plan[2], plan[3], plan[4]
        place = ctas - 1 - cta if turn % 2 == 0 else cta
        tile = (turn - 1) * ctas + place
        tile = to_tile - (turn - kept) if turn > kept else tile
        tile = to_tile if turn == 0 else tile
        first = from_step if (tile == from_tile) & ((turn == 0) | (turn > kept)) else Int32(0)
        end = to_step if turn == 0 else steps
        return tile, first, end if tile < plan[_TILES] else first

    @cute.jit
    def groups(self, plan):
        """Row groups of this CTA's tiles."""
        groups = Int32(self.config.rows)
        if plan[_FITS] == 1:
            groups = plan[_FITS + 6]
        return groups

    @cute.jit
    def locate(self, starts, order, bounds, plan, experts, row_tiles, tile):
        """(expert, first row group, first token, end of tokens, width, row groups) of a tile."""
        expert, group, first, end, width, groups = (Int32(0) for _ in range(6))
        if plan[_FITS] == 1:
            expert, group, first, end, width, groups = (plan[_FITS + 1 + i] for i in range(6))
        else:
            expert, row_tile, first, end, width = self.locate_whole(starts, order, bounds, experts, row_tiles, tile)
            group, groups = row_tile * self.config.rows, Int32(self.config.rows)
        return expert, group, first, end, width, groups

    @cute.jit
    def locate_whole(self, starts, order, bounds, experts, row_tiles, tile):
        """(expert, row tile, first token, end of tokens, width) of a tile of all row groups."""
        low = self.search(starts, row_tiles, tile, experts)
        begin, packed = starts[low], order[low]
        tiles = starts[low + 1] - begin
        expert, width = packed & 0xFFFF, packed >> 16
        inside = tile - begin * row_tiles
        # within what there is, whatever the numbers: offsets not yet written may be anything (no run has needed it)
        row_tile = Int32(Uint32(inside) // Uint32(cutlass.max(tiles, 1)))
        row_tile = cutlass.max(cutlass.min(row_tile, row_tiles - 1), 0)
        number = inside - row_tile * tiles
        lowest = bounds[expert]
        end = cutlass.max(bounds[expert + 1], lowest)
        # the last tiles have a grain less, if grains do not come out even
        grain = cutlass.const_expr(self.config.grain)
        narrow = number - (tiles - (tiles * width - (end - lowest)) // grain)
        first = lowest + number * width - cutlass.max(narrow, 0) * grain
        first = cutlass.min(cutlass.max(first, lowest), end)
        width = width - grain if narrow >= 0 else width
        return expert, row_tile, first, cutlass.min(end, first + width), width

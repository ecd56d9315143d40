"""Which tiles a CTA or pair of the Blackwell kernel computes, and which part of K.

Device code; needs nvidia-cutlass-dsl.
"""

from typing import Any

import cutlass
from cutlass import cute, pipeline

from glu4.backends.blackwell.config import Config

Int32 = cutlass.Int32
RESPONSES = 2  # of the launch control: a tile is asked for while the one before is loaded


class Tiles:
    """Part of DualGemm."""

    config: Config

    def work(self, shape: tuple, control: tuple, leader: Any) -> tuple:
        """What `each` needs: tiles along M, N and matrices, steps along K, launch control, whether this CTA leads its pair."""
        c = self.config
        tiles = (cute.ceil_div(shape[0], c.tile_m), cute.ceil_div(shape[1], c.tile_n), shape[3])
        return tiles, cute.ceil_div(shape[2], c.tile_k), control, leader

    def own(self) -> tuple:
        """(this CTA's or pair's number along M, along N, matrix) in the grid."""
        x, y, z = cute.arch.block_idx()
        return x // self.config.ctas, y, z // self.config.split

    def part(self, steps: Any) -> tuple:
        """(first step, steps) of this CTA's part of K; parts differ by one step at most, and none is empty (`legal`)."""
        if self.config.split == 1:
            return Int32(0), steps
        split = self.config.split
        own = cute.arch.block_idx()[2] % split
        first = own * steps // split
        return first, (own + 1) * steps // split - first

    @cute.jit
    def tile_at(self, index, tiles):
        """(tile along M, along N, matrix): the tiles of one column of C follow each other and share its weights."""
        return index % tiles[0], index // tiles[0] % tiles[1], index // (tiles[0] * tiles[1])

    @cute.jit
    def each(self, work, body: cutlass.Constexpr, states, asks: cutlass.Constexpr = False):
        """Every piece of work of this CTA or pair in its order: `states = body((tile, first step, steps), states)`.

        asks: this warp asks for further tiles where launch control gives them.
        """
        tiles, all_steps, control, leader = work
        first, steps = self.part(all_steps)
        if cutlass.const_expr(self.config.schedule == "static"):
            own, every = self.own()[0], cute.arch.grid_dim()[0] // self.config.ctas
            for index in cutlass.range(own, tiles[0] * tiles[1] * tiles[2], every, unroll=1):
                states = body((self.tile_at(index, tiles), first, steps), states)
        elif cutlass.const_expr(self.config.schedule == "stream_k"):
            unit, end = self.share(self.own()[0], tiles[0] * tiles[1] * tiles[2] * steps)
            while unit < end:
                first = unit % steps
                count = cutlass.min(steps - first, end - unit)
                states = body((self.tile_at(unit // steps, tiles), first, count), states)
                unit = unit + count
        elif cutlass.const_expr(self.config.schedule == "launch_control"):
            asked = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, RESPONSES)
            heard = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, RESPONSES)
            x, y, z, more = *self.own(), Int32(1)
            while more != 0:
                if cutlass.const_expr(asks):
                    if leader:
                        self.ask(control, asked)
                    asked.advance()
                states = body(((x, y, z), first, steps), states)
                x, y, z, more = self.next_tile(control, heard)
                heard.advance()
            if cutlass.const_expr(asks):
                if leader:
                    self.all_heard(control, asked)
        else:
            states = body((self.own(), first, steps), states)
        return states

    @cute.jit
    def first_piece(self, work):
        """What `each` begins with; of stream-K's workers some may have nothing, which is no step of the last tile."""
        tiles, all_steps, _, _ = work
        first, steps = self.part(all_steps)
        tile = self.own()
        if cutlass.const_expr(self.config.schedule == "static"):
            tile = self.tile_at(tile[0], tiles)
        elif cutlass.const_expr(self.config.schedule == "stream_k"):
            unit, end = self.share(tile[0], tiles[0] * tiles[1] * tiles[2] * steps)
            first = unit % steps
            tile, steps = self.tile_at(unit // steps, tiles), cutlass.min(steps - first, end - unit)
        return tile, first, steps

    # ---- parts of K ----

    @cute.jit
    def parts(self, work, piece, half):
        """Where a tile is shared: (number of this part, parts, ticket's number, place of part 0, place and distance of others).

        A worker of stream-K has two places: for a tile that it begins, whose part 0 it has, and for one that it ends.
        """
        c = self.config
        tiles, steps, _, _ = work
        (x, y, z), _, _ = piece
        tile = (z * tiles[1] + y) * tiles[0] + x
        number = tile * c.ctas + half
        own, count, place, apart = cute.arch.block_idx()[2] % c.split, Int32(c.split), number * c.split, 1
        zeroth = place
        if cutlass.const_expr(c.schedule == "stream_k"):
            units = tiles[0] * tiles[1] * tiles[2] * steps
            begins = self.worker_of(tile * steps, units)
            own = self.own()[0] - begins
            count = self.worker_of(tile * steps + steps - 1, units) - begins + 1
            place, apart = 2 * begins * c.ctas + half, 2 * c.ctas
            zeroth = place + c.ctas
        return own, count, number, zeroth, place, apart

    # ---- stream-K ----

    @cute.jit
    def share(self, worker, units):
        """(first, end) of a worker's units of all, a unit one step of one tile; shares differ by one unit at most."""
        workers = cute.arch.grid_dim()[0] // self.config.ctas
        each, more = units // workers, units % workers
        first = worker * each + cutlass.min(worker, more)
        return first, first + each + (1 if worker < more else 0)

    @cute.jit
    def worker_of(self, unit, units):
        """Whose share a unit is in."""
        workers = cute.arch.grid_dim()[0] // self.config.ctas
        each, more = units // workers, units % workers
        large = more * (each + 1)
        return unit // (each + 1) if unit < large else more + (unit - large) // cutlass.max(each, 1)

    # ---- cluster launch control ----

    def control(self, storage: Any, cluster: cute.Layout) -> tuple:
        """(pipeline of responses, where they are): each CTA of a pair gets every response."""
        c = self.config
        if c.schedule != "launch_control":
            return ()
        pipe = pipeline.PipelineClcFetchAsync.create(
            barrier_storage=storage.answered.data_ptr(), num_stages=RESPONSES, tx_count=16, cta_layout_vmnk=cluster,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, c.threads * c.ctas), defer_sync=True,
        )  # fmt: skip
        return pipe, cute.recast_ptr(storage.responses.data_ptr(), dtype=cutlass.Int128)

    @cute.jit
    def ask(self, control, state):
        """The warp of copies of the first CTA: take over a tile that no CTA has begun, if there is one."""
        pipe, responses = control
        pipe.producer_acquire(state)
        with cute.arch.elect_one():
            cute.arch.issue_clc_query(pipe.producer_get_barrier(state), responses + state.index)

    @cute.jit
    def all_heard(self, control, state):
        """The same, at its end: all threads of a pair signal its CTA's barriers, so it stays until they have."""
        pipe, _ = control
        for _ in cutlass.range_constexpr(RESPONSES):
            pipe.sync_object_empty.wait(state.index, state.phase)
            state.advance()

    @cute.jit
    def next_tile(self, control, state):
        """(tile along M, along N, matrix, 1 if there is one): by every thread."""
        c = self.config
        pipe, responses = control
        pipe.consumer_wait(state)
        x, y, z, more = cute.arch.clc_response(responses + state.index)
        cute.arch.fence_view_async_shared()  # the next response is written by the async proxy
        pipe.consumer_release(state)
        return x // c.ctas, y, z // c.split, more

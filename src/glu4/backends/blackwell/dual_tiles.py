"""Which tiles a CTA or pair of the Blackwell kernel computes, and which part of K.

Device code; needs nvidia-cutlass-dsl.
"""

from typing import Any

import cutlass
from cutlass import cute, pipeline

from glu4.backends.blackwell.config import THREADS, Config

Int32 = cutlass.Int32
RESPONSES = 2  # of the launch control: a tile is asked for while the one before is loaded


class Tiles:
    """Part of DualGemm."""

    config: Config

    def work(self, shape: tuple) -> tuple:
        """(own place, first tile's number, all tiles, distance to the next, tiles along M, N and matrices)."""
        c = self.config
        block_x, block_y, block_z = cute.arch.block_idx()
        tiles = (cute.ceil_div(shape[0], c.tile_m), cute.ceil_div(shape[1], c.tile_n), shape[3])
        first = block_x // c.ctas
        return (
            (first, block_y, block_z // c.split),
            first,
            tiles[0] * tiles[1] * tiles[2],
            cute.arch.grid_dim()[0] // c.ctas,
            tiles,
        )

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

    # ---- cluster launch control ----

    def control(self, storage: Any, cluster: cute.Layout) -> tuple:
        """(pipeline of responses, where they are): each CTA of a pair gets every response."""
        c = self.config
        if c.schedule != "launch_control":
            return ()
        pipe = pipeline.PipelineClcFetchAsync.create(
            barrier_storage=storage.answered.data_ptr(), num_stages=RESPONSES, tx_count=16, cta_layout_vmnk=cluster,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, THREADS * c.ctas), defer_sync=True,
        )  # fmt: skip
        return pipe, cute.recast_ptr(storage.responses.data_ptr(), dtype=cutlass.Int128)

    @cute.jit
    def ask(self, control, state):
        """Warp 5 of the first CTA: take over a tile that no CTA has begun, if there is one."""
        pipe, responses = control
        pipe.producer_acquire(state)
        with cute.arch.elect_one():
            cute.arch.issue_clc_query(pipe.producer_get_barrier(state), responses + state.index)

    @cute.jit
    def all_heard(self, control, state):
        """Warp 5 of the first CTA, at its end: all threads of a pair signal its barriers, so it stays until they have."""
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

"""The warp of copies of the Blackwell kernel: operands to shared memory.

Device code; needs nvidia-cutlass-dsl.
"""

from functools import partial

import cutlass
from cutlass import cute, pipeline

from glu4.backends.blackwell.config import Config
from glu4.backends.blackwell.instructions import EVICT_FIRST, EVICT_NORMAL

Int32, Int64 = cutlass.Int32, cutlass.Int64
# operands, in the order of atoms, tensors and copies
A, SCALE_A, GATE, SCALE_GATE, UP, SCALE_UP = range(6)  # with one matrix, up's are there and unused


class Loads:
    """Part of DualGemm."""

    config: Config
    sharing: int  # tiles that share an atom of the weights' scales

    @property
    def ahead(self) -> int:
        """Steps along K whose copies are started before the first products: what the stages hold.

        One warp that does both must not wait for the stage of the products it issued last, so it leaves one stage free.
        """
        c = self.config
        return c.stages if c.warps == "specialised" else max(1, c.stages - 1)

    @cute.jit
    def load_tiles(self, context, work):
        """The warp of copies."""
        loaded, begin = self.begin_loads(context, work)
        loaded, begin = self.each(work, partial(self.load_tile, context), (loaded, begin), asks=True)
        self.end_loads(context, loaded)

    @cute.jit
    def begin_loads(self, context, work):
        """(state, steps of the first tile that were loaded): when the kernel in front is done, but for early weights."""
        c = self.config
        loaded = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, c.stages)
        begin = Int32(0)
        if cutlass.const_expr(c.early_weights):
            piece = self.first_piece(work)
            begin = cutlass.min(piece[2], self.ahead)
            loaded = self.load_early(context, piece, begin, loaded)
        elif cutlass.const_expr(c.pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        return loaded, begin

    @cute.jit
    def end_loads(self, context, loaded):
        """A CTA stays until its last stages are free: a pair's commits arrive in both."""
        pipes = context[2]
        for p in cutlass.range_constexpr(len(pipes)):
            pipes[p].producer_tail(loaded.clone() if cutlass.const_expr(p + 1 < len(pipes)) else loaded)

    @cute.jit
    def load_tile(self, context, piece, states):
        """All of a tile, but for the steps that were loaded early."""
        loaded, begin = states
        return self.load(context, piece, begin, piece[2], loaded), Int32(0)

    @cute.jit
    def load_early(self, context, piece, count, state):
        """The first `count` steps: weights at once, A when the kernel in front is done."""
        pipes = context[2]
        ahead = state.clone()
        for step in cutlass.range(count, unroll=1):
            for p in cutlass.range_constexpr(len(pipes)):
                pipes[p].producer_acquire(ahead)
                self.copy(context, p, (GATE, SCALE_GATE, UP, SCALE_UP), piece, step, ahead)
            self.prefetch(context, (SCALE_GATE, SCALE_UP), piece, step + self.config.stages)
            ahead.advance()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        for step in cutlass.range(count, unroll=1):
            self.copy(context, 0, (A, SCALE_A), piece, step, state)
            self.prefetch(context, (SCALE_A,), piece, step + self.config.stages)
            state.advance()
        return state

    @cute.jit
    def load(self, context, piece, begin, end, state):
        """Start the copies of the steps along K of a tile from `begin` to `end`, as stages become free."""
        pipes = context[2]
        for step in cutlass.range(begin, end, unroll=1):
            self.prefetch(context, (SCALE_A, SCALE_GATE, SCALE_UP), piece, step + self.config.stages)
            for p in cutlass.range_constexpr(len(pipes)):
                pipes[p].producer_acquire(state)
                self.copy(context, p, tuple(range(6)), piece, step, state)
            state.advance()
        return state

    @cute.jit
    def prefetch(self, context, which: cutlass.Constexpr, piece, step):
        """The scales of a step, where there is one, to L2."""
        atoms, copies, _, _ = context
        tile_at, origin, steps = piece
        if cutlass.const_expr(self.config.prefetch_scales):
            if step < steps:
                with cute.arch.elect_one():
                    for i in cutlass.range_constexpr(len(atoms)):
                        if cutlass.const_expr(i in which):
                            cute.prefetch(atoms[i], copies[i][0][(None, self.tile_of(i, tile_at), origin + step, tile_at[2])])

    @cute.jit
    def tile_of(self, i: cutlass.Constexpr, tile_at):
        """The tile of an operand: along M, along N, or of scales that narrow tiles share."""
        tile = tile_at[0]
        if cutlass.const_expr(i in (GATE, UP)):
            tile = tile_at[1]
        if cutlass.const_expr(i in (SCALE_GATE, SCALE_UP)):
            tile = tile_at[1] // self.sharing
        return tile

    @cute.jit
    def copy(self, context, p: cutlass.Constexpr, which: cutlass.Constexpr, piece, step, state):
        """Start the copies of a step of those operands in `which` whose arrival the p-th pipeline counts."""
        c = self.config
        atoms, copies, pipes, mask = context
        tile_at, origin, _ = piece
        barrier = pipes[p].producer_get_barrier(state)
        for i in cutlass.range_constexpr(len(atoms)):
            if cutlass.const_expr(i in which and (len(pipes) == 1 or p == i // UP)):
                source, target = copies[i]
                multicast = mask if cutlass.const_expr(i in (SCALE_GATE, SCALE_UP)) else None
                policy = Int64(EVICT_FIRST if c.evict_first and i >= GATE else EVICT_NORMAL)
                cute.copy(
                    atoms[i], source[(None, self.tile_of(i, tile_at), origin + step, tile_at[2])], target[(None, state.index)],
                    tma_bar_ptr=barrier, mcast_mask=multicast, cache_policy=policy,
                )  # fmt: skip

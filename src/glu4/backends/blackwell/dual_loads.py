"""Warp 5 of the Blackwell kernel: copies of operands to shared memory.

Device code; needs nvidia-cutlass-dsl.
"""

import cutlass
from cutlass import cute, pipeline

from glu4.backends.blackwell.config import Config
from glu4.backends.blackwell.dual_tiles import RESPONSES
from glu4.backends.blackwell.instructions import EVICT_FIRST, EVICT_NORMAL

Int32, Int64 = cutlass.Int32, cutlass.Int64
# operands, in the order of atoms, tensors and copies
A, SCALE_A, GATE, SCALE_GATE, UP, SCALE_UP = range(6)  # with one matrix, up's are there and unused


class Loads:
    """Part of DualGemm."""

    config: Config
    sharing: int  # tiles that share an atom of the weights' scales

    @cute.jit
    def load_tiles(self, context, work):
        """Warp 5."""
        c = self.config
        own, first, count, every, tiles, control, leader = work
        _, _, pipes, steps, _, _ = context
        loaded = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, c.stages)
        begin = Int32(0)
        if cutlass.const_expr(c.early_weights):
            begin = cutlass.min(steps, c.stages)
            tile = self.tile_at(first, tiles) if cutlass.const_expr(c.schedule == "static") else own
            loaded = self.load_early(context, tile, begin, loaded)
        elif cutlass.const_expr(c.pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if cutlass.const_expr(c.schedule == "static"):
            for index in cutlass.range(first, count, every, unroll=1):
                loaded = self.load(context, self.tile_at(index, tiles), begin, loaded)
                begin = Int32(0)
        elif cutlass.const_expr(c.schedule == "launch_control"):
            asked = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, RESPONSES)
            heard = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, RESPONSES)
            x, y, z, more = *own, Int32(1)
            while more != 0:
                if leader:
                    self.ask(control, asked)
                asked.advance()
                loaded = self.load(context, (x, y, z), begin, loaded)
                begin = Int32(0)
                x, y, z, more = self.next_tile(control, heard)
                heard.advance()
            if leader:
                self.all_heard(control, asked)
        else:
            loaded = self.load(context, own, begin, loaded)
        for p in cutlass.range_constexpr(len(pipes)):
            pipes[p].producer_tail(loaded.clone() if cutlass.const_expr(p + 1 < len(pipes)) else loaded)

    @cute.jit
    def load_early(self, context, tile_at, count, state):
        """The first `count` steps: weights at once, A when the kernel in front is done."""
        pipes = context[2]
        ahead = state.clone()
        for step in cutlass.range(count, unroll=1):
            for p in cutlass.range_constexpr(len(pipes)):
                pipes[p].producer_acquire(ahead)
                self.copy(context, p, (GATE, SCALE_GATE, UP, SCALE_UP), tile_at, step, ahead)
            self.prefetch(context, (SCALE_GATE, SCALE_UP), tile_at, step + self.config.stages)
            ahead.advance()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        for step in cutlass.range(count, unroll=1):
            self.copy(context, 0, (A, SCALE_A), tile_at, step, state)
            self.prefetch(context, (SCALE_A,), tile_at, step + self.config.stages)
            state.advance()
        return state

    @cute.jit
    def load(self, context, tile_at, begin, state):
        """Start the copies of every step along K of a tile from `begin`, as stages become free."""
        _, _, pipes, steps, _, _ = context
        for step in cutlass.range(begin, steps, unroll=1):
            self.prefetch(context, (SCALE_A, SCALE_GATE, SCALE_UP), tile_at, step + self.config.stages)
            for p in cutlass.range_constexpr(len(pipes)):
                pipes[p].producer_acquire(state)
                self.copy(context, p, tuple(range(6)), tile_at, step, state)
            state.advance()
        return state

    @cute.jit
    def prefetch(self, context, which: cutlass.Constexpr, tile_at, step):
        """The scales of a step, where there is one, to L2."""
        atoms, copies, _, steps, _, origin = context
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
    def copy(self, context, p: cutlass.Constexpr, which: cutlass.Constexpr, tile_at, step, state):
        """Start the copies of a step of those operands in `which` whose arrival the p-th pipeline counts."""
        c = self.config
        atoms, copies, pipes, _, mask, origin = context
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

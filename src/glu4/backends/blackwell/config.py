"""What can be tuned in the Blackwell kernel, and which configurations may run a problem.

A CTA, or a pair of CTAs that multiply together, computes `tile_m` x `tile_n` outputs: both products of the tile lie in tensor
memory until the epilogue reads them. Four warps read the accumulators and write out; one issues the MMAs and one the copies, or
one does both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from glu4.problem import GroupedProblem, Problem

__all__ = ["Config", "candidates", "cost", "legal"]

MMA_K = 64  # of one MMA with e2m1 operands (PTX ISA, tcgen05.mma, kind mxf4nvf4)
ATOM_ROWS, ATOM_SCALES = 128, 4  # of the 512-byte atom of block scales (glu4.scale_layout)
SHARED_BYTES = 227 * 1024  # a CTA's most on sm_100 (CUDA programming guide, table of technical specifications)
TMEM_COLUMNS = 512  # of each CTA (PTX ISA, tensor memory addressing)
BARRIER_BYTES = 1024  # barriers and the address of tensor memory, padded to a swizzle atom
_COPY_ALIGN = 16  # bytes: strides of a tensor map are multiples of it (CUDA driver API, cuTensorMapEncodeTiled)
_LOAD_WIDTHS = (8, 16, 32, 64)
_ORDERS = ("interleaved", "by_matrix")
_BARRIERS = ("joint", "separate")
_SCHEDULES = ("one_wave", "static", "launch_control", "stream_k")
_WARPS = ("specialised", "single")
_STORES = ("direct", "tma")
_SILUS = ("exp", "tanh")
_STORE_BUFFERS = 2
_NOT_OF_A_PART = "the activation of a part of a sum means nothing"


@dataclass(frozen=True)
class Config:
    """One kernel.

    ctas        1, or 2 that share each MMA: each holds half of A's rows, of the weights' and of the accumulators'
    tile_m      rows of C (tokens) of the CTA or pair; tile_n columns, of gate and of up each
    tile_k      K of one stage of operands in shared memory; stages of them
    order       of the products of a stage: "interleaved" alternates gate and up every 64 of K, so that both use the same A
                one after the other; "by_matrix" does all of gate first
    barriers    "joint": one mbarrier a stage; "separate": one for A and gate, one for up, which may come later
    schedule    "one_wave": a CTA or pair for each tile; "static": as many as fit on the device, each of which takes every so
                many-th tile and loads the next one's operands while the last one is written; "launch_control": a CTA or pair
                for each tile, but one that runs takes over tiles of those that have not begun, and loads as in "static";
                "stream_k": as many as fit, each with the same number of steps along K of all tiles in one row: who ends or
                begins within a tile leaves sums as with `split`. A result depends on the number of processors, on nothing else
    load_width  columns of each accumulator that a thread of the epilogue reads at once
    gate_first  steps along K, the last ones, of which all gate products are issued before those of up, so that the epilogue
                computes the activation while the tensor core does up's; 0: gate and up end together
    collector   A stays in the tensor core's collector buffer from gate's product to up's; needs order "interleaved"
    evict_first weights leave the L2 cache first: each is read by few CTAs
    pdl         programmatic dependent launch: the kernel starts before the one in front of it in its stream has ended, and
                waits for that one before it reads or writes memory
    early_weights  weights and their scales fill the first stages before that wait: only for weights that the kernel in front
                does not write
    prefetch_scales  the scales of the step `stages` later are fetched to L2 while its stage is still in use
    store       "direct": 16 bytes a thread from registers; "tma": through shared memory, two buffers of load_width columns
    split       CTAs or pairs that share a tile, each with a part of K: all but the last to finish leave their sums in a
                workspace, and that one adds them up in the order of K, so that a result does not depend on who was last
    warps       "specialised": one issues the MMAs, one the copies; "single": one does both, by turns
    silu        "exp": sigmoid by ex2.approx and division; "tanh": by one tanh.approx, whose error is up to 2^-12 |gate up|
                (PTX ISA, tanh: maximum relative error 2^-11), never a default
    """

    ctas: int = 1
    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 256
    stages: int = 4
    order: str = "interleaved"
    barriers: str = "joint"
    load_width: int = 32
    gate_first: int = 0
    collector: bool = False
    evict_first: bool = False
    pdl: bool = False
    schedule: str = "one_wave"
    early_weights: bool = False
    prefetch_scales: bool = False
    store: str = "direct"
    silu: str = "exp"
    split: int = 1
    warps: str = "specialised"

    def __post_init__(self) -> None:
        if self.ctas not in (1, 2):
            raise ValueError(f"ctas: expected 1 or a pair, 2, got {self.ctas}")
        for name in ("tile_m", "tile_n", "tile_k", "stages", "split"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.gate_first < 0:
            raise ValueError(f"gate_first: expected a number of steps or 0, got {self.gate_first}")
        for name, known in (
            ("order", _ORDERS),
            ("barriers", _BARRIERS),
            ("schedule", _SCHEDULES),
            ("load_width", _LOAD_WIDTHS),
            ("store", _STORES),
            ("silu", _SILUS),
            ("warps", _WARPS),
        ):
            if getattr(self, name) not in known:
                listed = ", ".join(str(v) for v in known)
                raise ValueError(f"{name}: expected one of {listed}, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        tile = f"m{self.tile_m}n{self.tile_n}k{self.tile_k}"
        order = {"interleaved": "i", "by_matrix": "b"}[self.order] + {"joint": "j", "separate": "s"}[self.barriers]
        switches = (
            "a" * self.collector
            + "e" * self.evict_first
            + "p" * self.pdl
            + {"one_wave": "", "static": "t", "launch_control": "c", "stream_k": "k"}[self.schedule]
        )
        switches += "w" * self.early_weights + "f" * self.prefetch_scales + "o" * (self.store == "tma")
        switches += "h" * (self.silu == "tanh") + "u" * (self.warps == "single") + (f"x{self.split}" if self.split > 1 else "")
        return f"c{self.ctas}{tile}s{self.stages}{order}l{self.load_width}g{self.gate_first}{switches}"

    @property
    def copy_warp(self) -> int:
        """The number of the warp of copies; that of MMAs is 4."""
        return 5 if self.warps == "specialised" else 4

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return 32 * (self.copy_warp + 1)

    @property
    def shares_tiles(self) -> bool:
        """Whether several CTAs or pairs may sum one tile, in a workspace."""
        return self.split > 1 or self.schedule == "stream_k"

    @property
    def scale_rows(self) -> int:
        """Rows of the block scales of a weight that a tile loads: whole atoms, of which a narrow tile uses a part."""
        return max(ATOM_ROWS, self.tile_n)

    @property
    def a_bytes(self) -> int:
        """Shared memory of A and its scales in one stage of one CTA."""
        return self.tile_m // self.ctas * self.tile_k * 9 // 16

    @property
    def weight_bytes(self) -> int:
        """Shared memory of gate, or of up, in one stage of one CTA: half of a pair's codes, and all of its scales."""
        return self.tile_n // self.ctas * self.tile_k // 2 + self.scale_rows * self.tile_k // 16

    def stage_bytes(self, weights: int = 2) -> int:
        """Shared memory of one stage of one CTA; weights: matrices, 1 or 2."""
        return self.a_bytes + weights * self.weight_bytes

    @property
    def store_bytes(self) -> int:
        """Shared memory of the buffers through which TMA writes C, 16 bits an element."""
        return _STORE_BUFFERS * 128 * self.load_width * 2 if self.store == "tma" else 0

    def shared_bytes(self, weights: int = 2) -> int:
        """Shared memory of one CTA."""
        return BARRIER_BYTES + self.stages * self.stage_bytes(weights) + self.store_bytes

    def most_stages(self, weights: int = 2) -> int:
        """As many as fit."""
        return (SHARED_BYTES - BARRIER_BYTES - self.store_bytes) // self.stage_bytes(weights)

    @property
    def a_scale_columns(self) -> int:
        """Columns of tensor memory for A's scales of a stage: 4 for 128 rows and 64 of K."""
        return ATOM_ROWS // 32 * (self.tile_k // MMA_K)

    @property
    def weight_scale_columns(self) -> int:
        """Columns of tensor memory for gate's, or up's, scales of a stage."""
        return self.scale_rows // 32 * (self.tile_k // MMA_K)

    def used_columns(self, weights: int = 2) -> int:
        """Columns of tensor memory: the accumulators, then the scales of A and of each weight."""
        return weights * (self.tile_n + self.weight_scale_columns) + self.a_scale_columns

    def columns(self, weights: int = 2) -> int:
        """Columns to allocate: a power of two, at least 32 (PTX ISA, tcgen05.alloc)."""
        return max(32, 1 << (self.used_columns(weights) - 1).bit_length())

    def grid(self, m: int, n: int, batch: int = 1, processors: int = 148) -> tuple[int, int, int]:
        """CTAs for a `[batch, m, n]` output: tiles along M times the CTAs of a pair, along N, matrices; or one wave's CTAs."""
        across, down = -(-m // self.tile_m), -(-n // self.tile_n)
        if self.schedule == "stream_k":
            return processors // self.ctas * self.ctas, 1, 1
        if self.schedule == "static":
            return min(processors // self.ctas, across * down * batch) * self.ctas, 1, 1
        return across * self.ctas, down, batch * self.split

    def tickets(self, m: int, n: int, batch: int = 1) -> int:
        """Of a `[batch, m, n]` output: one for each CTA's rows of a tile."""
        return -(-m // self.tile_m) * -(-n // self.tile_n) * batch * self.ctas

    def workspace_bytes(self, m: int, n: int, batch: int = 1, weights: int = 2, processors: int = 148) -> int:
        """Of a `[batch, m, n]` output: int32 tickets, then float32 sums of the parts of tiles that several CTAs share.

        Tickets are zero before a launch, and the kernel leaves them so. 4 bytes, which nothing reads, where no tile is shared.
        """
        if not self.shares_tiles:
            return 4
        tickets = self.tickets(m, n, batch)
        parts = tickets * self.split
        if self.schedule == "stream_k":
            parts = 2 * (processors // self.ctas * self.ctas)  # of the tile that a CTA ends, and of the one that it begins
        return 4 * (tickets + parts * weights * self.tile_n * 128)


def legal(config: Config, problem: Problem | GroupedProblem) -> str | None:
    """Why `config` may not run `problem`, in one sentence with the hardware's rule behind it; None when it may."""
    if isinstance(problem, GroupedProblem):
        return "grouped problems have no Blackwell kernel yet"
    return _illegal_tile(config) or _does_not_fit(config, problem.weight_matrices) or _unsupported(config, problem)


def _illegal_tile(c: Config) -> str | None:
    if c.ctas == 1 and c.tile_m != 128:
        return f"tile_m {c.tile_m}: a block-scaled MMA of one CTA has 128 rows (PTX ISA, tcgen05.mma, shapes)"
    if c.ctas == 2 and c.tile_m == 128:
        place = "both CTAs read the scales of their 64 rows at one address of tensor memory"
        return f"tile_m 128 of a pair: {place}, and 64 rows further in an atom of {ATOM_ROWS} are two columns further"
    if c.ctas == 2 and c.tile_m != 256:
        return f"tile_m {c.tile_m}: a block-scaled MMA of a pair has 128 or 256 rows (PTX ISA, tcgen05.mma, shapes)"
    step = 8 * c.ctas
    if c.tile_n > 256 or c.tile_n % step:
        return f"tile_n {c.tile_n}: the MMA takes multiples of {step} up to 256 (PTX ISA, tcgen05.mma, shapes)"
    if c.tile_n not in (32, 64) and c.tile_n % ATOM_ROWS:
        atoms = f"block scales come in atoms of {ATOM_ROWS} rows, 32 to a column of tensor memory"
        return f"tile_n {c.tile_n}: {atoms}, so a tile has 32, 64 or whole atoms"
    if c.tile_k not in (128, 256):
        return f"tile_k {c.tile_k}: a row of a stage is one swizzle span of 64 or 128 bytes, 128 or 256 of K"
    if c.load_width > c.tile_n:
        return f"load_width {c.load_width}: an accumulator has {c.tile_n} columns"
    return None


def _does_not_fit(c: Config, weights: int) -> str | None:
    used, most = c.used_columns(weights), c.most_stages(weights)
    if used > TMEM_COLUMNS:
        sums = f"{weights} accumulators of {c.tile_n} columns"
        return f"{sums} and {used - weights * c.tile_n} of scales exceed the {TMEM_COLUMNS} columns of tensor memory"
    if c.stages > most:
        taken = f"{c.stages} stages take {c.shared_bytes(weights)} bytes of shared memory"
        return f"{taken}; a CTA has {SHARED_BYTES}, enough for {most}"
    if c.gate_first > c.stages:
        stay = f"these steps stay in shared memory until up's products, and there are {c.stages} stages"
        return f"gate_first {c.gate_first}: {stay}"
    return None


def _unsupported(c: Config, problem: Problem) -> str | None:
    if problem.weight_matrices == 1 and (c.gate_first or c.collector or c.barriers == "separate"):
        return 'gate_first, collector and barriers "separate" order two products, and linear has one'
    if c.collector and c.order != "interleaved":
        return 'collector: the buffer holds one A, so gate and up must use it one after the other, order "interleaved"'
    if problem.weight_matrices == 1 and c.silu != "exp":
        return f'silu "{c.silu}": linear has no activation'
    if c.early_weights and not c.pdl:
        return "early_weights: what they come before is griddepcontrol.wait, which a kernel has with pdl"
    if c.store == "tma" and problem.n * 2 % _COPY_ALIGN:
        rows = f"tensor copies need rows of a multiple of {_COPY_ALIGN} bytes"
        return f'store "tma", N {problem.n}: {rows}, so N must be a multiple of 8 (CUDA driver API, cuTensorMapEncodeTiled)'
    if c.schedule == "stream_k" and c.gate_first:
        return f'schedule "stream_k", gate_first {c.gate_first}: {_NOT_OF_A_PART}'
    if c.split > 1:
        reason = _illegal_split(c, -(-problem.k // c.tile_k))
        if reason:
            return reason
    if problem.x_format != "nvfp4":
        return f"{problem.x_format} activations: the block-scaled MMA takes 4-bit operands on both sides; quantize them first"
    if problem.out_dtype.itemsize != 2:
        return "float32 output: the kernel writes float16 or bfloat16"
    if problem.k // 2 % _COPY_ALIGN:
        return f"K {problem.k}: tensor copies need rows of a multiple of {_COPY_ALIGN} bytes, so K must be a multiple of 32"
    return None


def _illegal_split(c: Config, steps: int) -> str | None:
    if c.split > steps:
        return f"split {c.split}: K has {steps} steps of {c.tile_k}, and a part needs one"
    if c.gate_first:
        return f"split {c.split}, gate_first {c.gate_first}: {_NOT_OF_A_PART}"
    if c.schedule != "one_wave":
        return f'split {c.split}, schedule "{c.schedule}": the parts of a tile are CTAs of one wave'
    return None


_TILES = ((2, 256, 128), (2, 256, 64), (1, 128, 128), (1, 128, 64), (1, 128, 32))  # CTAs, M, N; a pair before one CTA
_GATE_FIRST = 3


def _with_switches(tile: Config, weights: int) -> Config:
    """As many stages as fit, and, for two products, what the best public kernels use (docs/blackwell.md)."""
    stages = tile.most_stages(weights)
    if weights == 1:
        return replace(tile, stages=stages, evict_first=True)
    gate_first = min(_GATE_FIRST, stages)
    return replace(tile, stages=stages, barriers="separate", gate_first=gate_first, collector=True, evict_first=True)


def cost(config: Config, problem: Problem, processors: int = 148) -> int:
    """To order configurations by: waves of CTAs times the bytes that each loads. It predicts no time, and none was measured."""
    x, y, z = config.grid(problem.m, problem.n, problem.batch)
    loaded = config.stage_bytes(problem.weight_matrices) * -(-problem.k // config.tile_k)
    return -(-x * y * z // processors) * loaded


def candidates(problem: Problem | GroupedProblem, processors: int = 148) -> Iterator[Config]:
    """Configurations that may run `problem`, by `cost`, of equal ones the larger tile first; the first is the default."""
    if isinstance(problem, GroupedProblem):
        return
    configs = [_with_switches(Config(*tile), problem.weight_matrices) for tile in _TILES]
    yield from sorted((c for c in configs if legal(c, problem) is None), key=lambda c: cost(c, problem, processors))

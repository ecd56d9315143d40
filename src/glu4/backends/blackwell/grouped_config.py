"""What can be tuned in the Blackwell kernel of grouped products, and which configurations may run a problem.

Every group has an M, N and K of its own. Weights are the MMA's M and tokens its N: an MMA of a CTA has 128 rows, which N always
fills, and as few as 8 columns, for groups of few tokens. So `tile_m` counts weights here and `tile_n` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from glu4.backends.blackwell.config import BARRIER_BYTES, SHARED_BYTES, TMEM_COLUMNS, Config, legal
from glu4.problem import Problem

__all__ = ["GroupConfig", "Size", "Tile", "candidates", "cost", "grouped_legal", "most_groups", "tiles"]

Size = tuple[int, int, int]  # of a group: tokens M, weights N, and K
Tile = tuple[int, int, int]  # (group, tile along its weights, tile along its tokens)
_PARAMETER_BYTES = 32764  # of a kernel's parameters (PTX ISA, kernel function parameters)
_FIXED_BYTES = 2 * 12 + 4 * 12 + 3 * 8 + 4 * 4 + 8  # of them: of all groups, and padding
_SCHEDULES = ("static", "launch_control", "one_wave")
_STORES = ("direct", "shared")


@dataclass(frozen=True)
class GroupConfig:
    """One kernel, for exactly `groups` groups, of which some may be empty. Fields not told here: `config.Config`.

    gated       two weights a group, gate and up, and C = act(A gate^T) * (A up^T); otherwise the plain product
    tile_m      weights, columns of C, of the CTA or pair; tile_n tokens, rows of C
    schedule    "static": as many CTAs or pairs as fit on the device, each of which takes every so many-th tile of all groups;
                "launch_control": one for each tile, but one that runs takes over tiles of those that have not begun;
                "one_wave": one for each tile
    store       "direct": a thread stores the 16 bits of its row of weights, a warp 64 bytes of a token; "shared": each warp
                turns them round in shared memory, and a thread stores 16 bytes
    """

    groups: int
    gated: bool = False
    ctas: int = 1
    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 256
    stages: int = 4
    load_width: int = 32
    schedule: str = "static"
    store: str = "shared"
    evict_first: bool = False
    pdl: bool = False

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups: expected a positive number, got {self.groups}")
        for name, known in (("schedule", _SCHEDULES), ("store", _STORES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)}")
        _ = self.mma  # whose other fields are checked

    @cached_property
    def mma(self) -> Config:
        """The dense kernel's configuration of one matrix product whose loads, products and shared memory are the same.

        Its buffers of TMA stores have the size of those in which the warps turn a tile round.
        """
        return Config(
            self.ctas, self.tile_m, self.tile_n, self.tile_k, self.stages, load_width=self.load_width, schedule=self.schedule,
            store="tma" if self.store == "shared" else "direct", evict_first=self.evict_first, pdl=self.pdl,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return f"g{self.groups}{self.mma.name}"

    @property
    def maps(self) -> int:
        """Tensor maps of each group: codes and scales of weights and of tokens; then of up."""
        return 6 if self.gated else 4

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage of one CTA."""
        return self.mma.stage_bytes(1) + self.gated * self.mma.a_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one CTA."""
        return BARRIER_BYTES + self.stages * self.stage_bytes + self.mma.store_bytes

    @property
    def most_stages(self) -> int:
        """As many as fit."""
        return (SHARED_BYTES - BARRIER_BYTES - self.mma.store_bytes) // self.stage_bytes

    @property
    def used_columns(self) -> int:
        """Columns of tensor memory: the sums, of gate and of up, then the scales of weights, of tokens, and of up."""
        return self.mma.used_columns(1) + self.gated * (self.tile_n + self.mma.a_scale_columns)

    @property
    def columns(self) -> int:
        """Columns to allocate: a power of two, at least 32 (PTX ISA, tcgen05.alloc)."""
        return max(32, 1 << (self.used_columns - 1).bit_length())

    def grid(self, sizes: Sequence[Size], processors: int = 148) -> tuple[int, int, int]:
        """CTAs; one CTA or pair where there are no tiles."""
        count = max(1, len(tiles(self, sizes)))
        return (min(processors // self.ctas, count) if self.schedule == "static" else count) * self.ctas, 1, 1


def tiles(config: GroupConfig, sizes: Sequence[Size]) -> list[Tile]:
    """All tiles in the order of the schedule: group by group, the tiles of the same weights one after the other."""
    return [
        (group, x, y)
        for group, (m, n, _) in enumerate(sizes)
        for x in range(-(-n // config.tile_m))
        for y in range(-(-m // config.tile_n))
    ]


def most_groups(gated: bool = False) -> int:
    """Whose parameters fit."""
    return (_PARAMETER_BYTES - _FIXED_BYTES) // _group_bytes(gated)


def _group_bytes(gated: bool) -> int:
    """Parameters of each group: maps, C, row stride, and M, N, K, with padding."""
    return (6 if gated else 4) * 128 + 8 + 8 + 3 * 4 + 4


def grouped_legal(config: GroupConfig, sizes: Sequence[Size]) -> str | None:
    """Why `config` may not run groups of these sizes, in one sentence; None when it may."""
    if len(sizes) != config.groups:
        return f"groups {config.groups}: the kernel is compiled for a number of groups, and there are {len(sizes)}"
    most = most_groups(config.gated)
    if config.groups > most:
        took = f"{_group_bytes(config.gated)} bytes of parameters each"
        return f"groups {config.groups}: {took}, and a kernel has {_PARAMETER_BYTES}, enough for {most} (PTX ISA)"
    for group, (m, n, k) in enumerate(sizes):
        if min(m, n) < 0 or k < 1:
            return f"group {group}: expected M and N of 0 or more and a positive K, got {m}, {n}, {k}"
        # any N may be stored: what is not a multiple of 16 bytes goes element by element
        reason = legal(config.mma, Problem(m, -(-n // 8) * 8, k, operation="linear")) if k % 16 == 0 else None
        if reason is None and k % 32:
            reason = f"K {k}: tensor copies need rows of a multiple of 16 bytes, so K must be a multiple of 32"
        if reason is not None:
            return f"group {group}: {reason}" if reason.startswith("K ") else reason
    return _does_not_fit(config) if config.gated else None


def _does_not_fit(c: GroupConfig) -> str | None:
    """Of two weights; of one the dense kernel's rule says so."""
    if c.used_columns > TMEM_COLUMNS:
        sums = f"2 accumulators of {c.tile_n} columns"
        return f"{sums} and {c.used_columns - 2 * c.tile_n} of scales exceed the {TMEM_COLUMNS} columns of tensor memory"
    if c.stages > c.most_stages:
        taken = f"{c.stages} stages take {c.shared_bytes} bytes of shared memory"
        return f"{taken}; a CTA has {SHARED_BYTES}, enough for {c.most_stages}"
    return None


def cost(config: GroupConfig, sizes: Sequence[Size], processors: int = 148) -> int:
    """To order configurations by: bytes that the CTA that loads most of them does. It predicts no time; none was measured."""
    workers = max(1, processors // config.ctas)
    loaded = [0] * workers
    for i, (group, _, _) in enumerate(tiles(config, sizes)):
        loaded[i % workers] += config.stage_bytes * -(-sizes[group][2] // config.tile_k)
    return max(loaded)


_TILES = ((2, 256, 256), (2, 256, 128), (2, 256, 64), (1, 128, 256), (1, 128, 128), (1, 128, 64), (1, 128, 32))


def candidates(
    sizes: Sequence[Size], processors: int = 148, schedule: str = "static", gated: bool = False
) -> Iterator[GroupConfig]:
    """Configurations that may run groups of these sizes, by `cost`, of equal ones the larger tile first."""
    configs = []
    for tile in _TILES:
        c = GroupConfig(len(sizes), gated, *tile, schedule=schedule, evict_first=True)
        configs.append(replace(c, stages=max(1, c.most_stages)))
    legal_ones = [c for c in configs if grouped_legal(c, sizes) is None]
    yield from sorted(legal_ones, key=lambda c: cost(c, sizes, processors))

"""What can be tuned in the Hopper kernel, which configurations may run a problem, and their order.

A CTA computes `rows` x 64 packed weight rows (gate and up interleaved in eights: 32 outputs for each 64) by `tokens`
tokens. `rows` x `k_groups` consumer warpgroups share the work, each decoding its own weights: k_groups > 1 lets several of
them take turns along K, so that one decodes while another multiplies; their sums are added in a fixed order. One further
warpgroup issues the copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glu4.problem import Problem

__all__ = ["SHIPPED", "Config", "candidates", "cost", "legal"]

MULTIPROCESSORS = 132  # of an H100 SXM and an H200
WARPGROUP = 128
DECODE_WARPS = 4  # that decode NVFP4 tokens, in kernels that do
DECODE_AHEAD = 4  # stages whose codes each of them asks for ahead
STAGED_ROW = 72  # bytes of a row of NVFP4 tokens in a stage: 128 codes and 8 scales
DECODE_THREADS, DECODE_WORDS = 128, 2  # of a CTA that decodes tokens ahead; words of eight codes that a thread takes at most
DECODE_MANY = 1 << 17  # words from which it takes so many, and fewer CTAs start (benchmarks/results/h200-decode-words.json)
UNIT_BYTES = 2304  # one packed unit, 64 rows x 64 of K: 2048 bytes of codes and 256 of scales
TILE_K = 64
_SHARED_BYTES = 227 * 1024  # a CTA's most on sm_90 (CUDA programming guide, table of technical specifications)
_REGISTERS = 65536
PRODUCER_REGISTERS, DECODER_REGISTERS = 24, 64  # of threads that issue copies, that decode
_MAX_STAGES = 24
# rows of A, columns of B: wgmma takes 64 by 8 to 256 in steps of 8 (PTX ISA, wgmma.mma_async)
_TOKEN_TILES = (8, 16, 32, 64, 128, 192, 256)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _unroll(ring: int, stage_units: int) -> int:
    return max(u for u in range(1, 7) if ring % u == 0 and (u == 1 or u * stage_units <= 6))


@dataclass(frozen=True)
class Config:
    """One kernel. tokens: 8 to 256; rows, k_groups: warpgroups; fragment_sets: 2 decodes ahead of the running product;
    stage_units: steps of 64 along K that one stage holds, so that the producer issues fewer, larger copies; cluster: CTAs side
    by side along N that load a share of their tokens each and multicast it; splits: CTAs that share a tile's K, add their
    sums through distributed shared memory and write a share of the tile each; store: outputs leave shared memory through
    "threads", or as "bulk" copies of a token's outputs of one warpgroup; producers: "warps" of their own issue the copies, or
    with "none" the first consumer warp does."""

    tokens: int
    rows: int = 2
    k_groups: int = 1
    fragment_sets: int = 2
    stage_units: int = 2
    cluster: int = 1
    splits: int = 1
    store: str = "threads"
    producers: str = "warps"

    def __post_init__(self) -> None:
        if self.tokens not in _TOKEN_TILES:
            raise ValueError(f"tokens: expected one of {_TOKEN_TILES}, got {self.tokens}")
        if not 1 <= self.rows * self.k_groups <= 6:
            raise ValueError(f"rows x k_groups: expected 1 to 6 warpgroups, got {self.rows} x {self.k_groups}")
        if self.fragment_sets not in (1, 2) or self.fragment_sets > self.stage_units:
            raise ValueError(f"fragment_sets: expected 1, or 2 with two stage_units, got {self.fragment_sets}")
        if self.stage_units not in (1, 2):  # packed weights are followed by one spare unit, which a last stage may read
            raise ValueError(f"stage_units: expected 1 or 2, got {self.stage_units}")
        if self.cluster not in (1, 2) or self.tokens < 8 * self.cluster:
            raise ValueError(f"cluster: expected 1 or 2 CTAs with 8 tokens each, got {self.cluster} for {self.tokens} tokens")
        if self.splits not in (1, 2, 4) or self.splits * self.cluster > 4 or self.splits * 8 > self.tokens:
            raise ValueError(f"splits: expected 1, 2 or 4 of at least 8 tokens, got {self.splits} for {self.tokens} tokens")
        if self.cluster > 1 and self.splits > 1:
            raise ValueError("cluster, splits: expected one of them to be 1")
        if self.store not in ("threads", "bulk"):
            raise ValueError(f"store: expected threads or bulk, got {self.store!r}")
        if self.producers not in ("warps", "none"):
            raise ValueError(f"producers: expected warps or none, got {self.producers!r}")
        if self.producers == "none" and self.k_groups > 1:
            raise ValueError(f"producers: without them one group uses every stage, and k_groups is {self.k_groups}")
        if self.producers == "none" and self.cluster * self.splits > 1:
            raise ValueError("producers: without them a CTA copies for itself alone, and cluster and splits are 1")

    @property
    def name(self) -> str:
        multicast = f"c{self.cluster}" if self.cluster > 1 else ""
        split = f"s{self.splits}" if self.splits > 1 else ""
        switches = "b" * (self.store == "bulk") + "n" * (self.producers == "none")
        return f"t{self.tokens}r{self.rows}g{self.k_groups}f{self.fragment_sets}u{self.stage_units}{multicast}{split}{switches}"

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.rows * self.k_groups

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: tokens in 16 bits and packed weights, 64 of K a unit."""
        return self.stage_units * (self.tokens * TILE_K * 2 + self.rows * UNIT_BYTES)

    @property
    def stages(self) -> int:
        """As many as fit, a multiple of k_groups: each stage then belongs to one group, which sees every phase of its barrier.

        A group that saw every second phase could take one parity for another while a copy is late.
        """
        ring = min(_MAX_STAGES, (_SHARED_BYTES - 1024) // self.stage_bytes) // self.k_groups
        while ring > 3 and _unroll(ring, self.stage_units) == 1:
            ring -= 1
        return ring * self.k_groups

    @property
    def unroll(self) -> int:
        """Stages of one group in a pass of its main loop, so that most addresses are constants: a divisor of its stages."""
        if self.tokens == 256:  # long products: few instructions for each, and a longer loop measured 1 to 2 % slower
            return 1
        return _unroll(self.stages // self.k_groups, self.stage_units)

    @property
    def reduction_bytes(self) -> int:
        """Shared memory, where the tokens were, for the float32 sums of other groups and of other splits."""
        groups = (self.k_groups - 1) * self.rows * 64 * self.tokens * 4
        splits = (self.splits - 1) * self.rows * 64 * (self.tokens // self.splits) * 4
        return max(groups, splits)

    def staging_pitch(self, dual: bool) -> int:
        """Bytes from one token to the next of a warpgroup's outputs in shared memory; the odd 16 avoid bank conflicts."""
        return (32 if dual else 64) * 2 + 16

    @property
    def box_tokens(self) -> int:
        """Rows of the tensor map's box: the share of the tokens that one CTA of a cluster loads."""
        return self.tokens // self.cluster

    @property
    def token_group(self) -> int:
        """Token tiles whose rows of weights are done together: 1024 tokens stay in L2 while the weights pass by."""
        return max(1, 1024 // self.tokens)

    def grid(self, m: int, n: int, dual: bool) -> tuple[int, int, int]:
        """CTAs: token tiles of a group, weight rows (a multiple of the cluster), groups times splits."""
        token_tiles = _ceil_div(m, self.tokens)
        row_tiles = _ceil_div(n, self.rows * (32 if dual else 64))
        groups = _ceil_div(token_tiles, self.token_group)
        x = min(token_tiles, self.token_group)
        return x, _ceil_div(row_tiles, self.cluster) * self.cluster, groups * self.splits

    @property
    def staging_bytes(self) -> int:
        """Shared memory of NVFP4 tokens before they are decoded: DECODE_AHEAD stages for each warp."""
        return DECODE_WARPS * DECODE_AHEAD * self.tokens * STAGED_ROW

    def shared_bytes(self, nvfp4: bool) -> int:
        """Barriers, padded so that the tokens start at a swizzle atom, then the stages."""
        return 1024 + self.stages * self.stage_bytes + nvfp4 * self.staging_bytes

    @property
    def takes_nvfp4(self) -> bool:
        """Whether a kernel of it may decode NVFP4 tokens itself: few of them, so that decoding in every CTA costs little.

        Each of the warps that decode has its own stages, for the reason that `stages` gives.
        """
        simple = self.stage_units == 2 and self.cluster == self.splits == 1 and self.producers == "warps"
        return self.tokens == 8 and simple and self.stages % DECODE_WARPS == 0

    def cta_threads(self, nvfp4: bool) -> int:
        """Consumers, a warpgroup that issues copies if there is one, and one that decodes NVFP4 tokens."""
        return (self.consumers + (self.producers == "warps") + nvfp4) * WARPGROUP

    def launch_registers(self, nvfp4: bool) -> int:
        """Registers a thread at launch, which setmaxnreg then moves from the producers to the consumers; without producers the
        most that a thread may have."""
        return min(240, _REGISTERS // self.cta_threads(nvfp4) // 8 * 8)

    def consumer_registers(self, nvfp4: bool) -> int:
        """What the producers leave."""
        taken = PRODUCER_REGISTERS + nvfp4 * DECODER_REGISTERS
        pool = self.launch_registers(nvfp4) * self.cta_threads(nvfp4) - taken * WARPGROUP
        return min(240, pool // (self.consumers * WARPGROUP) // 8 * 8)


# what the dispatch can choose, measured best somewhere (docs/notebook-hopper.md)
SHIPPED = (
    Config(8, 1, 3, 1, 2),
    Config(16, 1, 4, 1, 2),
    Config(32, 1, 2, 2, 2),
    Config(64, 1, 3, 1, 2),
    Config(128, 2, 1, 2, 2, splits=2),
    Config(128, 2, 2, 1, 2),
    Config(128, 3, 1, 1, 2),
    Config(128, 3, 1, 1, 2, splits=2),
    Config(256, 2, 1, 2, 2),
    Config(256, 2, 1, 2, 2, splits=2),
    Config(256, 2, 1, 2, 2, cluster=2),
)


def legal(config: Config, problem: Problem) -> str | None:
    """Why `config` may not run `problem`, in one sentence; None when it may."""
    if problem.x_format == "float32":
        return "float32 activations: wgmma would round them to TF32, which is not exact"
    if problem.out_dtype.itemsize != 2:
        return "float32 output: the kernel writes float16 or bfloat16"
    if config.stages < 2 * config.k_groups:
        return f"{config.stages} stages do not give each of {config.k_groups} groups two"
    staged = config.rows * (config.tokens // config.splits) * config.staging_pitch(problem.operation == "dual_gemm")
    needed, there = config.reduction_bytes + staged, config.stages * config.stage_units * config.tokens * TILE_K * 2
    if needed > there:
        return f"sums and outputs take {needed} bytes, more than the {there} where the tokens were"
    return None


def cost(config: Config, problem: Problem, processors: int = MULTIPROCESSORS) -> float:
    """Predicted cycles, to order configurations by; fitted to one H100 (docs/notebook-hopper.md).

    A step of 64 along K takes the decode's and the products' issue time of all warpgroups, or the latency of one, whichever
    is longer; a wave has a fixed cost, and so has the exchange of sums between splits.
    """
    outputs = config.rows * (32 if problem.operation == "dual_gemm" else 64)
    token_tiles = _ceil_div(problem.m, config.tokens)
    row_tiles = _ceil_div(_ceil_div(problem.n, outputs), config.cluster) * config.cluster
    ctas = problem.batch * token_tiles * row_tiles * config.splits
    step = max(config.rows * (55 + 2.05 * config.tokens), 115 + 2.05 * config.tokens)
    steps = _ceil_div(_ceil_div(problem.k, TILE_K), config.splits)
    cycles = _ceil_div(ctas, processors) * (steps * step + 5000 + 2500 * (config.splits > 1))
    # multicast saves power where many waves run (1 % of 8), and costs a start in step (1.5 % of two waves)
    return cycles * (1.0 if config.cluster == 1 else 0.985 if ctas > 4 * processors else 1.01)


def candidates(problem: Problem, processors: int = MULTIPROCESSORS) -> Iterator[Config]:
    """The shipped configurations that may run `problem`, best first."""
    runnable = [c for c in SHIPPED if legal(c, problem) is None]
    return iter(sorted(runnable, key=lambda c: cost(c, problem, processors)))

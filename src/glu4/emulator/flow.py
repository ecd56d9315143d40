"""Control flow of a function: where the lanes of a divergent branch meet again.

The place is the immediate post-dominator of the branch, computed on basic blocks by the iterative algorithm of Cooper, Harvey
and Kennedy on the reversed graph.
"""

from __future__ import annotations

from collections.abc import Collection

from glu4.emulator.ptx.module import (
    Address,
    Function,
    Instruction,
    Label,
    Negated,
    Operand,
    OperandList,
    Pair,
    Register,
    Vector,
)

__all__ = ["ends_path", "reads_and_writes", "reconvergence", "registers_in_flight", "successors", "unfenced_registers"]

_LEAVES = ("exit", "ret", "trap")


def ends_path(instruction: Instruction) -> bool:
    """Whether no lane that runs this goes on to the next instruction."""
    return instruction.guard is None and (instruction.opcode in _LEAVES or instruction.opcode in ("bra", "brx"))


def successors(function: Function, place: int) -> list[int]:
    """Instructions that may follow; len(instructions) stands for the function's end."""
    instruction = function.instructions[place]
    end = len(function.instructions)
    found = [] if ends_path(instruction) else [place + 1]
    if instruction.opcode == "bra":
        found += [o.target for o in instruction.operands if isinstance(o, Label) and o.target >= 0]
    elif instruction.opcode == "brx":
        for operand in instruction.operands:
            if isinstance(operand, Label):
                found += function.tables.get(operand.name, ())
    elif instruction.opcode == "ret" and not function.entry:
        found.append(end)
    return found


def reconvergence(function: Function) -> dict[int, int | None]:
    """For each branch that can diverge: the instruction where its lanes meet, len(instructions) for the end, None for nowhere.

    A guarded ret of a device function counts as a branch. Lanes that exit never come back, so that the way to an exit does not
    delay a meeting: only the last exit in the text counts as an end, and for code that cannot reach it, the last one it can.
    """
    code = function.instructions
    branches = [i for i, c in enumerate(code) if c.opcode in ("bra", "brx") and (c.guard or c.opcode == "brx")]
    if not function.entry:
        branches += [i for i, c in enumerate(code) if c.opcode == "ret" and c.guard]
    if not branches:
        return {}
    leaders, block_of, blocks = _blocks(function)
    parents: dict[int, int] = {}
    for root in _roots(function, leaders, block_of):
        if root not in parents:
            found = _dominators(blocks, root, parents.keys())
            parents.update(found)
    result: dict[int, int | None] = {}
    for i in branches:
        up = parents.get(block_of[i])
        if up is None or up == block_of[i]:
            result[i] = None
        else:
            result[i] = len(code) if up == len(leaders) else leaders[up]
    return result


def _roots(function: Function, leaders: list[int], block_of: list[int]) -> list[int]:
    """Blocks to count as ends, in order of preference."""
    leaves = [i for i, c in enumerate(function.instructions) if c.opcode in _LEAVES and c.guard is None]
    ends = [len(leaders)]  # of a device function: its return
    return ends + [block_of[i] for i in reversed(leaves)]


def _blocks(function: Function) -> tuple[list[int], list[int], list[list[int]]]:
    """(first instruction of each block, block of each instruction, successors of each block; the last block is the end)."""
    code = function.instructions
    starts = {0}
    for i, c in enumerate(code):
        if c.opcode in ("bra", "brx", *_LEAVES):
            starts.update(s for s in successors(function, i) if s < len(code))
            if i + 1 < len(code):
                starts.add(i + 1)
    leaders = sorted(starts)
    block_of = [0] * len(code)
    edges: list[list[int]] = []
    number = {place: n for n, place in enumerate(leaders)}
    for n, first in enumerate(leaders):
        last = (leaders[n + 1] if n + 1 < len(leaders) else len(code)) - 1
        for i in range(first, last + 1):
            block_of[i] = n
        edges.append(sorted({number.get(s, len(leaders)) for s in successors(function, last)}))
    edges.append([])
    return leaders, block_of, edges


def _reversed_order(edges: list[list[int]], root: int, done: Collection[int]) -> list[int]:
    """Blocks that reach `root` and are not in `done`, in reverse post-order of the reversed graph."""
    back: list[list[int]] = [[] for _ in edges]
    for n, targets in enumerate(edges):
        for t in targets:
            back[t].append(n)
    seen, out = {root, *done}, []
    stack: list[tuple[int, int]] = [(root, 0)]
    while stack:
        node, i = stack.pop()
        if i < len(back[node]):
            stack.append((node, i + 1))
            if back[node][i] not in seen:
                seen.add(back[node][i])
                stack.append((back[node][i], 0))
        else:
            out.append(node)
    return out[::-1]


def _dominators(edges: list[list[int]], root: int, done: Collection[int]) -> dict[int, int]:
    """Immediate post-dominator of each block that reaches `root`; the root is its own."""
    order = _reversed_order(edges, root, done)
    rank = {node: i for i, node in enumerate(order)}
    parent = {root: root}

    def meet(a: int, b: int) -> int:
        while a != b:
            while rank[a] > rank[b]:
                a = parent[a]
            while rank[b] > rank[a]:
                b = parent[b]
        return a

    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            best: int | None = None
            for target in edges[node]:
                if target in parent:
                    best = target if best is None else meet(best, target)
            if best is not None and parent.get(node) != best:
                parent[node] = best
                changed = True
    return parent


# registers

_NO_RESULT = (
    "st",
    "red",
    "bra",
    "brx",
    "bar",
    "barrier",
    "cp",
    "fence",
    "membar",
    "prefetch",
    "call",
    "ret",
    "exit",
    "stmatrix",
)


def _registers(operand: Operand) -> set[int]:
    if isinstance(operand, Register):
        return {operand.index}
    if isinstance(operand, Negated):
        return {operand.operand.index}
    if isinstance(operand, Pair):
        return _registers(operand.first) | _registers(operand.second)
    if isinstance(operand, Vector | OperandList):
        return set().union(*map(_registers, operand.elements))
    if isinstance(operand, Address):
        return _registers(operand.base).union(*map(_registers, operand.rest))
    return set()


def reads_and_writes(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Indices of the registers that an instruction reads and writes; accumulators of wgmma count as both."""
    operands = instruction.operands
    writes: set[int] = set()
    first = operands[0] if operands else None
    if first is not None and instruction.opcode not in _NO_RESULT and not isinstance(first, Address):
        writes = _registers(first)
    reads = set().union(*map(_registers, operands if instruction.opcode == "wgmma" or not writes else operands[1:]))
    if instruction.guard is not None:
        reads.add(instruction.guard[0].index)
    return reads, writes


def registers_in_flight(function: Function) -> set[int]:
    """Registers that asynchronous operations use: wgmma's accumulators and A, destinations of tcgen05.ld."""
    found: set[int] = set()
    for instruction in function.instructions:
        if instruction.opcode == "wgmma" and instruction.modifiers[:1] == ("mma_async",) and len(instruction.operands) > 1:
            found |= _registers(instruction.operands[0])
            if isinstance(instruction.operands[1], Vector):
                found |= _registers(instruction.operands[1])
        elif instruction.opcode == "tcgen05" and instruction.modifiers[:1] == ("ld",) and instruction.operands:
            found |= _registers(instruction.operands[0])
    return found


def unfenced_registers(function: Function) -> list[set[int]]:
    """For each instruction: those registers of wgmma that some path writes after its last wgmma.fence.

    At the function's start all are: wgmma.fence has to come before the first wgmma (PTX ISA 9.7.15.7.1).
    """
    code = function.instructions
    watched = registers_in_flight(function)
    state: list[set[int] | None] = [None] * (len(code) + 1)
    if not code:
        return []
    state[0] = set(watched)
    work = [0]
    while work:
        place = work.pop()
        instruction = code[place]
        after = set(state[place] or ())
        if instruction.opcode == "wgmma":
            after = set() if instruction.modifiers[:1] == ("fence",) else after
        else:
            after |= reads_and_writes(instruction)[1] & watched
        for follower in successors(function, place):
            known = state[follower]
            if known is None or not after <= known:
                state[follower] = after | (known or set())
                if follower < len(code):
                    work.append(follower)
    return [s or set() for s in state[: len(code)]]

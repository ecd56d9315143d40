"""clusterlaunchcontrol: a running cluster takes over one that has not been launched (PTX ISA 9.7.13.17 and 9.7.13.18).

The response is opaque to kernels. Here its words are x, then y and z of the first CTA, a mark, and whether it succeeded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from glu4.emulator.hazards import Origin
from glu4.emulator.isa.access import addresses, window
from glu4.emulator.isa.asynchronous import Issue
from glu4.emulator.isa.registry import Builder, Context, Modifiers, Step, U
from glu4.emulator.isa.tma import Target, targets
from glu4.emulator.lanes import one_lane
from glu4.emulator.ptx.module import Vector

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS"]

_BYTES = 16
_MARK = 0x434C4331
_REFUSED = "launch control refused"
_UNDEFINED = 0xD7D7D7D7  # what get_first_ctaid of a refused request gives
_KIND = "cluster launch control"


def _response(first: tuple[int, int, int] | None) -> np.ndarray[Any, Any]:
    """The 16 bytes for a cancelled cluster's first CTA, or for a refusal."""
    x, y, z = first or (0, 0, 0)
    return np.array([x, y | z << 16, _MARK, first is not None], dtype=np.uint32).view(np.uint8)


def _try_cancel(context: Context, mods: Modifiers) -> Step:
    if not mods.take("async"):
        raise mods.fail()
    space = mods.choice(("shared::cta",), "generic")
    if not mods.take("mbarrier::complete_tx::bytes"):
        raise mods.fail("expected .mbarrier::complete_tx::bytes")
    everyone = mods.take("multicast::cluster::all")
    mods.choice(("b128",))
    place, bar = (addresses(context.address(o)) for o in context.operands(2))

    def step(w: Split) -> None:
        to_all, bar_all = place(w).tolist(), bar(w).tolist()
        for i, lane in enumerate(np.flatnonzero(w.mask).tolist()):
            to, at = (window(a)[1] if space == "generic" else a for a in (to_all[i], bar_all[i]))
            _request(w, context, Issue(w, context, one_lane(lane)), to, at, everyone)

    return step


def _request(w: Split, context: Context, issue: Issue, to: int, bar: int, everyone: bool) -> None:
    cluster = w.warp.cta.cluster
    if w.warp.cta.extra.get(_REFUSED):
        issue.report(_KIND, "a request after the CTA has seen one refused")
    if everyone and any(not cta.alive for cta in cluster.ctas):
        issue.report("cluster lifetime", "the response goes to all CTAs of the cluster, of which one has exited")
        return
    if to % _BYTES:
        issue.report("misaligned address", f"the response needs a multiple of {_BYTES}", f"{to:#x}")
        return
    mask = (1 << len(cluster.ctas)) - 1 if everyone else None
    found = targets(w, context, issue, to, bar, mask, False, True)
    if any(t.offset + _BYTES > t.cta.shared.size for t in found):
        issue.report("out of bounds", "the response is written past the end of shared memory", f"{to:#x}")
        return
    # one request, answered in each CTA at a time of its own
    answer: list[Any] = []

    def decide() -> None:
        answer.append(_response(issue.machine.cancel()))

    first = issue.submit("clusterlaunchcontrol.try_cancel", decide)
    for target in found:
        issue.submit("clusterlaunchcontrol.try_cancel: response", lambda t=target: _answer(issue, t, answer[0]), (first,))


def _answer(issue: Issue, target: Target, response: np.ndarray[Any, Any]) -> None:
    barrier, shared = target.barrier, target.cta.shared
    where = slice(target.offset, target.offset + _BYTES)
    shared.data[where] = response
    issue.access(shared, where, 1, barrier.entity, barrier.next_time(), True)
    barrier.add_tx(-_BYTES, issue.origin, issue.message())


def _query(context: Context, mods: Modifiers) -> Step:
    if mods.take("is_canceled", "pred", "b128"):
        return _is_canceled(context)
    axis = {"get_first_ctaid::x": 0, "get_first_ctaid::y": 1, "get_first_ctaid::z": 2}
    word = mods.choice((*axis, "get_first_ctaid"))
    whole = word == "get_first_ctaid"
    if whole and not mods.take("v4"):
        raise mods.fail()
    if not mods.take("b32", "b128"):
        raise mods.fail()
    target, operand = context.operands(2)
    if whole and not isinstance(target, Vector):
        raise context.error("expected a vector of 4")
    parts = context.vector(target, 4)[:3] if whole else (target,)
    rows = [context.destination(part, "b32") for part in parts]
    source = context.source(operand, "b128")

    def step(w: Split) -> None:
        words = w.r[U][source].view(np.uint32)
        taken = _check(w, context, words)
        xyz = (words[:, 0], words[:, 1] & np.uint32(0xFFFF), words[:, 1] >> np.uint32(16))
        for row, value in zip(rows, xyz if whole else (xyz[axis[word]],)):
            w.put(w.r[U][row], np.where(taken, value, np.uint32(_UNDEFINED)))

    return step


def _is_canceled(context: Context) -> Step:
    target, operand = context.operands(2)
    predicate, source = context.destination(target, "pred"), context.source(operand, "b128")

    def step(w: Split) -> None:
        taken = _check(w, context, w.r[U][source].view(np.uint32))
        if not taken[w.mask].all():
            w.warp.cta.extra[_REFUSED] = True
        w.put(w.r[U][predicate], taken)

    return step


def _check(w: Split, context: Context, words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which lanes hold the response of a request that succeeded; reports what is no response."""
    if (words[w.mask, 2] != _MARK).any():
        origin = Origin(context.instruction, w.warp, w.mask)
        w.warp.cta.machine.monitor.report(_KIND, "the operand is not a response of try_cancel", origin)
    return np.asarray((words[:, 2] == _MARK) & (words[:, 3] == 1))


def _cluster_launch(context: Context, mods: Modifiers) -> Step:
    word = mods.choice(("try_cancel", "query_cancel"))
    return _try_cancel(context, mods) if word == "try_cancel" else _query(context, mods)


INSTRUCTIONS: dict[str, Builder] = {"clusterlaunchcontrol": _cluster_launch}

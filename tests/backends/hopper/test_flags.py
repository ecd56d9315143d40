"""Flags of launches: whose they are, and that they are zero."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from fake_hopper import FakeCuda, fake_hopper
from glu4.backends.hopper import flags


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_hopper(monkeypatch) as fake:
        yield fake


def test_each_stream_has_its_own(cuda: FakeCuda) -> None:
    first, second = flags.take(0, 1), flags.take(0, 2)
    assert abs(first - second) >= 4 * flags.FLAGS
    assert flags.take(0, 1) == first
    assert flags.take(1, 1) not in (first, second)


def test_each_graph_has_others_in_every_stream(cuda: FakeCuda) -> None:
    """Graphs that were captured in one stream may be replayed in several at once."""
    eager = flags.take(0, 1)
    seen = {eager}
    for cuda.graph in (5, 6):
        mine = {flags.take(0, stream) for stream in (1, 2)}
        assert len(mine) == 2
        assert not seen & mine
        assert flags.take(0, 1) in mine
        seen |= mine
    cuda.graph = 0
    assert flags.take(0, 1) == eager


def test_more_owners_than_one_allocation_serves(cuda: FakeCuda) -> None:
    count = 2 * flags._OWNERS + 3
    addresses = {flags.take(0, stream) for stream in range(count)}
    assert len(addresses) == count
    for address in addresses:
        assert not any((ctypes.c_int32 * flags.FLAGS).from_address(address))


def test_a_failure_is_said(cuda: FakeCuda) -> None:
    cuda.graph, cuda.failures["cuStreamGetCaptureInfo_v2"] = 3, 1
    with pytest.raises(RuntimeError, match="cuStreamGetCaptureInfo failed"):
        flags.take(0, 1)

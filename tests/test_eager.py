"""Which tensors and moments let a call skip its operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glu4.eager import ordinary, plain, unwatched


class Subclass(Tensor):
    pass


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)])


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(2)


UNUSUAL: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.ones(2, 2).to_sparse(),
    "mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
    "subclass": lambda: torch.ones(2).as_subclass(Subclass),
    "negated": lambda: torch.view_as_complex(torch.ones(2, 2)).conj().imag,
    "no memory": lambda: torch._efficientzerotensor(2),
    "meta": lambda: torch.ones(2, device="meta"),
    "nested": nested,
    "fake": fake,
    "functional": lambda: torch._to_functional_tensor(torch.ones(2)),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_tensors_that_are_not_plain(kind: str) -> None:
    assert not plain(UNUSUAL[kind]())
    assert not ordinary([torch.ones(1), UNUSUAL[kind]()])


def test_plain_tensors() -> None:
    t = torch.ones(4, 4)
    with torch.inference_mode():
        made = torch.ones(2)
    for one in (t, t[::2].t(), t.half(), t.expand(3, 4, 4), torch.nn.Parameter(t), made, torch.ones(0)):
        assert plain(one)
    assert not plain("x")  # type: ignore[arg-type]
    assert not plain([1.0])  # type: ignore[arg-type]


def test_autograd() -> None:
    wants = torch.ones(2, requires_grad=True)
    assert not ordinary([torch.ones(1), wants])
    with torch.no_grad():
        assert ordinary([torch.ones(1), wants])


def test_modes_transforms_and_tracers() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    x, seen = torch.ones(3, 3), []
    assert unwatched()
    with Mode():
        assert not unwatched()
    with torch.device("cpu"):
        assert not unwatched()

    def look(t: Tensor) -> Tensor:
        seen.append((unwatched(), plain(t)))
        return t.sum()

    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    assert seen == [(False, False), (False, False)]
    compiled = torch.compile(lambda t: t + 1 if unwatched() else t + 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x + 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert unwatched()

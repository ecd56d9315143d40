"""A run: checked, then timed; whatever goes wrong is said in a row and stops nobody else, unless it took the device."""

from __future__ import annotations

import pytest
import torch

from bench.fake_gpu import FakeGpu, contender, right
from glu4.backends.hopper.config import SHIPPED
from glu4.bench import ours
from glu4.bench.contender import Row
from glu4.bench.devices import device
from glu4.bench.operands import draw
from glu4.bench.run import METHOD, Lost, Settings, measure_shape, run

SHAPE = (24, 64, 128)
SETTINGS = Settings([SHAPE], commit="abc1234", variant="trial")


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glu4.bench.timing.COLD_BYTES", 50_000)


def measure(gpu: FakeGpu, *contenders) -> list[Row]:  # type: ignore[no-untyped-def]
    return measure_shape(draw(*SHAPE, "cpu"), contenders, gpu, SETTINGS, device("h100"))


def test_rows_say_what_was_measured() -> None:
    gpu = FakeGpu()
    glu4, peer = measure(gpu, contender("glu4", gpu, 0.01, specified=True, config="t8"), contender("other", gpu, 0.02))
    assert (glu4.us, glu4.us_min, glu4.samples) == (pytest.approx(10), pytest.approx(10), 82)
    assert (glu4.peer, glu4.shape, glu4.commit, glu4.variant, glu4.backend, glu4.chosen) == (
        ("glu4", SHAPE, "abc1234", "trial", "portable", True)
    )
    assert (peer.us, peer.variant, peer.backend, peer.chosen) == (pytest.approx(20), "", "", False)
    # 24 x 128 activations and 24 x 64 outputs in 16 bits, 2 x 64 x 128 weights of 9/16 byte
    nbytes = 2 * 24 * 128 + 2 * 24 * 64 + 2 * 64 * 128 * 9 // 16
    assert glu4.gb_s == pytest.approx(nbytes / 10e-6 / 1e9)
    assert glu4.tflops == pytest.approx(4 * 24 * 64 * 128 / 10e-6 / 1e12)
    assert glu4.limit_us == pytest.approx(max(nbytes / 3.0e6, 4 * 24 * 64 * 128 / 798e6), abs=1e-3)
    assert glu4.to_dict()["percent_of_limit"] == round(100 * glu4.limit_us / 10, 1)
    assert 0 < glu4.fro_rel_err < 5e-4


def test_a_peer_with_16_bit_weights_moves_more_bytes() -> None:
    sizes = {"us": 10.0, "us_min": 9.0, "x_format": "float16"}
    weights = {kind: Row("peer", *SHAPE, weights=kind, **sizes) for kind in ("nvfp4", "16-bit")}
    more = weights["16-bit"].gb_s - weights["nvfp4"].gb_s
    assert more == pytest.approx(2 * 64 * 128 * (2 - 9 / 16) / 10e-6 / 1e9)


def test_a_wrong_contender_is_not_timed() -> None:
    gpu = FakeGpu()
    wrong, good = measure(gpu, contender("wrong", gpu, output=lambda o: right(o, "float16") * 1.1), contender("good", gpu))
    assert wrong.us is None
    assert wrong.note.startswith("wrong, so not timed: relative error 0.09")
    assert wrong.fro_rel_err == pytest.approx(0.1, rel=0.1)
    assert good.us is not None
    assert good.note == ""


def test_one_that_fails_leaves_the_others_alone() -> None:
    gpu = FakeGpu()

    def fails(_: object) -> torch.Tensor:
        raise ValueError("N must be a multiple of 64")

    bad, good = measure(gpu, contender("bad", gpu, output=fails), contender("good", gpu))
    assert (bad.us, bad.note) == (None, "failed: ValueError: N must be a multiple of 64")
    assert good.us is not None


def test_a_lost_device_is_raised_with_the_rows_so_far() -> None:
    gpu = FakeGpu()

    def loses(_: object) -> torch.Tensor:
        gpu.lost = True
        raise RuntimeError("unspecified launch failure")

    with pytest.raises(Lost, match="bad took the device with it: RuntimeError: unspecified launch failure") as caught:
        measure(gpu, contender("good", gpu), contender("bad", gpu, output=loses))
    assert [row.peer for row in caught.value.rows] == ["good", "bad"]


def test_a_device_lost_while_timing_keeps_what_was_timed() -> None:
    gpu = FakeGpu()
    dying = contender("dying", gpu, 1.0)
    prepare = dying.prepare

    def limited(operands):  # type: ignore[no-untyped-def]
        calls = prepare(operands)

        def call() -> torch.Tensor:
            if gpu.now > 300:
                gpu.lost = True
                raise TimeoutError("the kernel did not end within 20 s")
            return calls[0]()

        return [call, call]

    object.__setattr__(dying, "prepare", limited)
    with pytest.raises(Lost, match="did not end") as caught:
        measure(gpu, contender("good", gpu, 1.0), dying)
    good, bad = caught.value.rows
    assert good.us == pytest.approx(1000)
    assert 0 < good.samples < 82
    assert bad.note.startswith("failed: TimeoutError")


@pytest.mark.parametrize("x_format", ["float16", "bfloat16", "nvfp4"])
def test_a_run_measures_the_public_call_with_every_activation_format(x_format: str) -> None:
    gpu = FakeGpu(tick=8.0)
    settings = Settings([(5, 64, 128), (1, 48, 64)], x_format)
    found = list(run(settings, device("h100"), gpu, "cpu", [contender("peer", gpu)]))
    assert [[row.peer for row in rows] for rows in found] == [["glu4", "peer"]] * 2
    for rows in found:
        assert rows[0].x_format == x_format
        assert rows[0].note == ""
        assert rows[0].samples == 82
        assert 0 < rows[0].us < 8000  # a replay is a tick, for several copies


def test_glu4_reads_another_copy_in_each_call() -> None:
    operands = draw(4, 64, 128, "cpu")
    held = ours.Prepared(operands)
    weights = held.weights(3)
    assert len({w.gate.codes.data_ptr() for w in weights}) == 3
    assert held.weights(2) == weights[:2]


def test_configurations_are_named_or_refused() -> None:
    operands = draw(4, 64, 128, "cpu")
    assert [c.key for c in ours.contenders(operands, "float16", "best")] == ["glu4"]
    every = ours.contenders(operands, "float16", "all")
    fitting = [c.name for c in SHIPPED if ours.fits(c, operands.problem("float16"))]
    assert [c.key for c in every] == ["glu4", *(f"glu4:{name}" for name in fitting)]
    assert 0 < len(fitting) < len(SHIPPED)
    name = SHIPPED[0].name
    assert [c.config for c in ours.contenders(operands, "float16", name)] == ["", name]
    with pytest.raises(ValueError, match=f"configs: expected best, all or one of {name}, .*, got 'fast'"):
        ours.contenders(operands, "float16", "fast")


def test_a_kernel_that_is_not_there_says_so() -> None:
    gpu = FakeGpu()
    operands = draw(4, 64, 128, "cpu")
    rows = measure_shape(operands, [ours.single(ours.Prepared(operands), SHIPPED[0], "float16")], gpu, SETTINGS, device("h100"))
    assert (
        rows[0].note == "failed: RuntimeError: the weights are not packed: no Hopper kernel is compiled here; run glu4 compile"
    )


def test_settings_refuse_an_unknown_format() -> None:
    with pytest.raises(ValueError, match="activation-format: expected one of float16, bfloat16, nvfp4, got 'fp8'"):
        Settings([SHAPE], "fp8")


def test_the_method_states_its_numbers() -> None:
    for part in ("200 MB", "8 ms", "40 warm-up", "41 timed", "0.4 s of rest", "2 turns", "median and minimum", "0.25"):
        assert part in METHOD

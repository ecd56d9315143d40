"""The roofline picture: drawn from recorded runs, the same every time, with the roofs and points that the run has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glu4.bench.contender import Row
from glu4.bench.report import Recorded, read

pytest.importorskip("matplotlib", reason="needs the report extra")
pytest.importorskip("jinja2", reason="needs the report extra")

from glu4.bench import picture

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def recorded() -> Recorded:
    return read(RESULTS / "h200-dense-second.json")


def run(device: str = "NVIDIA H100 80GB HBM3", roofs: dict[str, float] | None = None, **kwargs: object) -> Recorded:
    rows = [
        Row("glu4", 16, 4096, 7168, us=20.0, us_min=19.0, chosen=True, x_format="float16", limit_us=11.1),
        Row("glu4", 16, 4096, 7168, us=10.0, us_min=9.0, config="t8", chosen=False, x_format="float16"),
        Row("cublas_fp16", 16, 4096, 7168, us=60.0, us_min=59.0, x_format="float16"),
        Row("broken", 16, 4096, 7168, us=None, us_min=None, note="failed"),
    ]
    return Recorded(device, rows, roofs, {"method": "turns & medians <in> one run", "commit": "abc", **kwargs})


def test_drawing_is_reproducible(recorded: Recorded, tmp_path: Path) -> None:
    for suffix in (".png", ".html"):
        paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
        for path in paths:
            picture.draw(recorded, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert (tmp_path / "0.png").read_bytes().startswith(b"\x89PNG")


def test_points_lie_where_the_rows_say() -> None:
    axes = picture.figure(run()).axes[0]
    points = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines if line.get_marker() != "None"}
    # 16 x 7168 activations and 16 x 4096 outputs in 16 bits, 2 x 4096 x 7168 weights of 9/16 byte
    flops, nbytes = 4 * 16 * 4096 * 7168, 2 * 16 * 7168 + 2 * 16 * 4096 + 2 * 4096 * 7168 * 9 // 16
    assert list(points) == ["glu4", "cublas_fp16"]  # what a user gets, and no row without a time
    assert [float(p[0]) for p in points["glu4"]] == pytest.approx([flops / nbytes, flops / 20e-6 / 1e12])
    assert [float(p[0]) for p in points["cublas_fp16"]] == pytest.approx([flops / nbytes, flops / 60e-6 / 1e12])
    low, high = axes.get_ylim()
    assert low < flops / 60e-6 / 1e12 < 798 < high
    assert "M 16" in {t.get_text() for t in axes.texts}


@pytest.mark.parametrize(
    ("roofs", "bandwidth", "top"), [(None, "3.00 TB/s", "798 TFLOP/s"), ({"bandwidth": 2.5e12, "flops": 7e14}, "2.50", "700")]
)
def test_the_roofs_are_the_runs_own_or_the_projects(roofs: dict[str, float] | None, bandwidth: str, top: str) -> None:
    axes = picture.figure(run(roofs=roofs)).axes[0]
    texts = " ".join(t.get_text() for t in axes.texts)
    assert bandwidth in texts
    assert top in texts
    x, y = axes.lines[0].get_xdata(), axes.lines[0].get_ydata()
    rates = roofs or {"bandwidth": 3.0e12, "flops": 798e12}
    assert (x[1], y[1]) == pytest.approx((rates["flops"] / rates["bandwidth"], rates["flops"] / 1e12))
    assert y[0] / x[0] == pytest.approx(rates["bandwidth"] / 1e12)


def test_the_page_stands_alone_and_says_what_it_shows() -> None:
    html = picture.page(run())
    assert not re.search(r"(src|href)=[\"']?https?:|url\(http", html)
    assert not any(stand_in in html for stand_in in picture._STAND_INS.values())
    for variable in set(re.findall(r"var\(--(\w+)\)", html)):
        assert f"--{variable}:" in html
    assert "NVIDIA H100 80GB HBM3" in html
    assert "16, 4096, 7168" in html
    assert "3.00</td>" in html  # the peer's 60 us over 20
    assert "turns &amp; medians &lt;in&gt; one run" in html
    assert "cublas_fp16 at 16,4096,7168: 60.0 us, 36.8 % above the reference 43.9 us" in html


def test_a_device_without_roofs_is_refused() -> None:
    with pytest.raises(ValueError, match="NVIDIA L4: no roofs were measured in this run; run glu4 bench with --rooflines"):
        picture.figure(run("NVIDIA L4"))
    picture.figure(run("NVIDIA L4", roofs={"bandwidth": 3e11, "flops": 1e14}))


def test_a_run_that_timed_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="this run timed nothing"):
        picture.figure(Recorded("NVIDIA H200", [Row("glu4", 1, 8, 16, us=None, us_min=None)], None, {}))

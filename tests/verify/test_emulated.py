"""A submission whose launches are emulated: the exported one is right, planted faults are found, and errors are told."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from glu4.verify.contest import GROUP_TESTS, DualShape, GroupShape
from glu4.verify.emulated import run, shapes
from glu4.verify.export import export
from glu4.verify.submission import SubmissionError

if importlib.util.find_spec("cutlass") is None or shutil.which("cc") is None:
    pytest.skip("needs CuTe DSL to compile the kernel", allow_module_level=True)

pytestmark = pytest.mark.slow
SMALL = [DualShape(256, 512, 256)]
GROUPS = [GroupShape(((96, 128, 256), (128, 256, 512)))]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "submission.py"
    path.write_text(text)
    return path


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    return text.replace(old, new)


def test_the_exported_submission_is_right(tmp_path: Path) -> None:
    seen = []
    (found,) = run(write(tmp_path, export()), SMALL, tiles=2, on_outcome=seen.append)
    assert found.ok, found.findings
    assert seen == [found]
    assert (found.grid, found.cluster) == ((2, 8, 1), (2, 1, 1))
    assert found.tiles == ("rows 0 to 255, columns 0 to 63", "rows 0 to 255, columns 448 to 511")


FAULTS = {
    "gate and up exchanged": ("b1.data_ptr(), sfb1.data_ptr(), b2.data_ptr(), sfb2.data_ptr()",
                              "b2.data_ptr(), sfb2.data_ptr(), b1.data_ptr(), sfb1.data_ptr()", "wrong: "),
    "scales of the other weight": ("b1.data_ptr(), sfb1.data_ptr()", "b1.data_ptr(), sfb2.data_ptr()", "wrong: "),
    "another tensor returned": ("    return c  # type", "    return c.clone()  # type", "emulation needs custom_kernel to return data's own c"),
    "two launches": ("    plan.launch(index, torch._C._cuda_getCurrentRawStream(index), addresses, True)\n",
                     "    for _ in range(2):\n        plan.launch(index, torch._C._cuda_getCurrentRawStream(index), addresses, True)\n",
                     "emulation knows calls of one launch; this one made 2"),
    "an input is changed": ("    m, n, batch = c.shape\n", "    m, n, batch = c.shape\n    sfa.zero_()\n",
                            "the call changed its input sfa_permuted"),
}  # fmt: skip


# the others by prove-all: each compiles a submission of its own
SHORT = ("gate and up exchanged", "another tensor returned", "an input is changed", "one tensor returned")


def short(names: Iterable[str]) -> list[Any]:
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", short(FAULTS))
def test_planted_faults_are_found(tmp_path: Path, name: str) -> None:
    old, new, finding = FAULTS[name]
    (found,) = run(write(tmp_path, changed(export(), old, new)), SMALL, tiles=1)
    assert any(finding in f for f in found.findings), found.findings


def test_the_exported_group_submission_is_right_at_all_public_shapes(tmp_path: Path) -> None:
    """The first CTA or pair of each launch, the last one and one between."""
    found = run(write(tmp_path, export("group_gemm")), shapes(problem="group_gemm"), tiles=3)
    assert all(outcome.ok for outcome in found), [outcome.findings for outcome in found]
    assert {outcome.shape for outcome in found} == {str(shape) for shape in GROUP_TESTS}
    assert all(len(outcome.tiles) == 3 for outcome in found)
    assert found[0].tiles[0].startswith("group 0, rows 0 to ")
    last = f"group {len(GROUP_TESTS[3].sizes) - 1}, rows 192 to 255, columns 0 to 127"
    assert next(o for o in found if o.shape == str(GROUP_TESTS[3])).tiles[-1] == last


GROUP_FAULTS = {
    "scales of A for B": ("b.data_ptr(), scale_b.data_ptr()", "b.data_ptr(), scale_a.data_ptr()", "wrong: "),
    "operands of the group before": ("in zip(matrices, scales)", "in zip(matrices[-1:] + matrices[:-1], scales)", ""),
    "another list returned": ("return [c for _, _, c in matrices]", "return [c.clone() for _, _, c in matrices]",
                              "emulation needs custom_kernel to return data's own c"),
    "one tensor returned": ("return [c for _, _, c in matrices]", "return matrices[0][2]",
                            "emulation needs custom_kernel to return data's own c"),
    "an input is changed": ("    addresses += (ones, ones)\n", "    addresses += (ones, ones)\n    scales[1][0].zero_()\n",
                            "the call changed its input sfa_permuted of group 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", short(GROUP_FAULTS))
def test_planted_faults_of_the_group_submission_are_found(tmp_path: Path, name: str) -> None:
    old, new, finding = GROUP_FAULTS[name]
    (found,) = run(write(tmp_path, changed(export("group_gemm"), old, new)), GROUPS, tiles=2)
    assert any(finding in f for f in found.findings), found.findings


def test_what_cannot_be_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match=r"none.py: no such file; give the path of a Python file"):
        run(tmp_path / "none.py", SMALL)
    with pytest.raises(
        SubmissionError, match=r"submission.py: AttributeError: submission.py defines no function custom_kernel"
    ):
        run(write(tmp_path, "x = 1\n"), SMALL)
    with pytest.raises(SubmissionError, match=r"submission.py ended its process \(exit code 3\)"):
        run(write(tmp_path, "import os\nos._exit(3)\n"), SMALL)


def test_shapes_are_the_public_ones() -> None:
    assert len(shapes()) == 9, "of ten listed one is listed twice"
    assert shapes()[0] == SMALL[0]
    assert set(shapes(quick=True)) < set(shapes())
    assert set(shapes(problem="group_gemm")) == set(shapes(quick=True, problem="group_gemm")) == set(GROUP_TESTS)

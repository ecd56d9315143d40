"""A submission is the package's own code: what it imports, what it holds, and that it compiles to the package's kernel."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import glu4.verify.export as module
from glu4.backends.blackwell import config, grouped_config
from glu4.bench.suites import dual_problem
from glu4.verify.contest import DUAL_BENCHMARKS, DUAL_TESTS, GROUP_BENCHMARKS, GROUP_TESTS
from glu4.verify.export import export

needs_dsl = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs CuTe DSL to compile the kernel")
ROOT = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module", params=list(module.PROBLEMS))
def problem(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def text(problem: str) -> str:
    return export(problem)


def test_it_imports_torch_cute_dsl_and_the_standard_library_only(text: str) -> None:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module).split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"torch", "cutlass", "cuda"}, "cuda.bindings comes with CuTe DSL"


def test_every_statement_is_the_packages_own(text: str) -> None:
    """Part by part under its file's name. Line by line in device code, but for names that are told apart and the table; of host
    code, in which annotations become strings, statement by statement without annotations."""
    parts = re.split(r"^# ---- (glu4/\S+\.py) ----$", text, flags=re.MULTILINE)
    assert len(parts) > 20
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        source = (ROOT / name).read_text()
        theirs = {plain(node) for node in ast.parse(source).body}
        own = [node for node in ast.parse(part).body if module._targets(node) != ["TABLE"]]
        assert {plain(node) for node in own} <= theirs, name
        if "from __future__" not in source:
            lines = {line.strip() for line in source.splitlines()}
            changed = [line for line in part.splitlines() if line.strip() not in lines]
            assert len(changed) <= 20, f"{name}: {changed}"


def plain(statement: ast.stmt) -> str:
    """A statement without annotations, imports, and what tells names apart: `glu4.module.name` or `name_module` is `name`."""
    copied = ast.parse(ast.unparse(statement))
    for node in ast.walk(copied):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
            node.body = [s for s in node.body if not isinstance(s, (ast.ImportFrom, ast.Pass))]
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Name("annotation")
    found = re.sub(r"\b(arguments|driver)\.", "", ast.unparse(copied))
    modules = "launch|arguments|dual_loads|dual_tiles|dual_gemm|gemm|epilogue|instructions|build|driver|config|contest_kernel"
    return re.sub(rf"_(grouped_)?({modules})\b", "", found)


def test_it_begins_with_what_the_contest_reads_and_has_custom_kernel_last(problem: str, text: str) -> None:
    assert text.startswith(f"#!POPCORN leaderboard nvfp4_{problem}\n#!POPCORN gpus B200\n")
    last = ast.parse(text).body[-1]
    assert isinstance(last, ast.FunctionDef)
    assert last.name == "custom_kernel"


def test_no_name_is_defined_twice_and_none_is_missing(text: str) -> None:
    body = ast.parse(text).body
    meanings: dict[str, str] = {}
    for statement in body:
        for n in module._targets(statement):
            assert meanings.setdefault(n, module._meaning(statement, n)) == module._meaning(statement, n), (
                f"{n} has two meanings"
            )
    names = list(meanings)
    imported = {a.asname or a.name.split(".")[0] for s in ast.walk(ast.parse(text)) if isinstance(s, (ast.Import, ast.ImportFrom))
                for a in s.names}  # fmt: skip
    known = set(names) | imported | module._BUILTINS
    for statement in body:
        unknown = {n.id for n in module._global_nodes(statement, set()) if isinstance(n, ast.Name)} - known
        assert not unknown, f"line {statement.lineno}"


def test_the_table_has_the_public_shapes_and_their_defaults() -> None:
    text, groups = export("dual_gemm"), export("group_gemm")
    for s in (*DUAL_BENCHMARKS, *DUAL_TESTS):
        assert f"    ({s.m}, {s.n}, {s.k}, {s.batch}): {next(config.candidates(dual_problem(s)))!r}," in text
    for g in (*GROUP_BENCHMARKS, *GROUP_TESTS):
        sizes = ", ".join(f"({m}, {n}, {k}, 1)" for m, n, k in g.sizes)
        assert f"    ({sizes}): {next(grouped_config.candidates(g.sizes))!r}," in groups


def test_unknown_problems_and_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="problem: expected one of dual_gemm, group_gemm, got 'gemm'"):
        export("gemm")
    with pytest.raises(ValueError, match="shape_table: expected one of default, got 'best'"):
        export("dual_gemm", "best")


def bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **sources: str) -> str:
    """The text of a package made of these modules, from `root`."""
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    made = module._Bundle("glu4.root")
    texts = [line for _, found in made.texts({}) for line in found]
    return "\n".join([*sorted(made.outside), *texts])


def run(text: str) -> dict[str, object]:
    scope: dict[str, object] = {}
    exec(text, scope)
    return scope


def test_only_what_is_reached_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = bundle(
        monkeypatch, tmp_path,
        root="from glu4.other import used\n\ndef custom_kernel():\n    other = 3\n    return used() + other\n",
        other="import math\nimport json\n\nLIMIT = 4\n\ndef used():\n    return math.floor(LIMIT + 0.5)\n\ndef other():\n    return json\n",
    )  # fmt: skip
    assert run(text)["custom_kernel"]() == 7  # type: ignore[operator]
    assert "json" not in text
    assert "def other" not in text, "a local name is no use of a module's"


def test_names_that_clash_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = bundle(
        monkeypatch, tmp_path,
        root="from glu4 import other\nfrom glu4.other import SIZE as HIS, f\n\nSIZE = 2\n\ndef custom_kernel():\n"
             "    return SIZE, HIS, f(), other.f(), other.Thing().SIZE, other.Thing().get()\n",
        other="SIZE = 5\n\ndef f():\n    return SIZE\n\nclass Thing:\n    SIZE = 9\n    TWICE = 2 * SIZE\n\n    def get(self):\n        return SIZE + self.TWICE\n",
    )  # fmt: skip
    assert run(text)["custom_kernel"]() == (2, 5, 5, 5, 9, 23)  # type: ignore[operator]


def test_imports_within_functions_and_postponed_annotations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = bundle(
        monkeypatch, tmp_path,
        root="from __future__ import annotations\nfrom glu4.other import Later\n\ndef custom_kernel(x: Later | None = None) -> "
             "Later:\n    from glu4.other import (\n        f,\n    )\n\n    return f(2)\n",
        other="def f(x: int):\n    return x\n\nclass Later:\n    pass\n",
    )  # fmt: skip
    assert run(text)["custom_kernel"]() == 2  # type: ignore[operator]
    assert "class Later" not in text, "an annotation that nothing evaluates"
    assert "def f(x: int):" in text, "one that is evaluated"


# ---- compiled ----

_COMPILE = """
import json, re, sys, tempfile
sys.path.insert(0, sys.argv[1])
import submission
def code(ptx): return re.sub(r"kernel_cutlass\\w*|0X[0-9A-F]+|//.*", "", ptx)
key = json.loads(sys.argv[2])
config = submission.TABLE[tuple(key) if isinstance(key[0], int) else tuple(map(tuple, key))]
with tempfile.TemporaryDirectory() as scratch:
    if hasattr(submission, "GroupConfig"):
        from glu4.backends.blackwell.grouped_build import compile_grouped
        from glu4.backends.blackwell.grouped_config import GroupConfig
        from glu4.backends.blackwell.grouped_spec import GroupSpec
        fields = {name: getattr(config, name) for name in GroupConfig.__dataclass_fields__}
        mine = submission.compile_grouped(submission.Spec(config), scratch)[1]
        theirs = compile_grouped(GroupSpec(GroupConfig(**fields)), scratch)[1]
    else:
        from glu4.backends.blackwell.build import _compile
        from glu4.backends.blackwell.config import Config
        from glu4.backends.blackwell.spec import KernelSpec
        mine = submission._compile(submission.Spec(config), scratch)[0].artifacts.PTX
        theirs = _compile(KernelSpec(Config(**vars(config)), "f16"), scratch)[0].artifacts.PTX
print(code(mine) == code(theirs), len(mine))
"""


@pytest.mark.slow
@needs_dsl
def test_it_compiles_to_the_packages_kernel(problem: str, text: str, tmp_path: Path) -> None:
    """The same PTX, names aside."""
    (tmp_path / "submission.py").write_text(text)
    s, groups = DUAL_BENCHMARKS[0], GROUP_BENCHMARKS[0]
    key = [s.m, s.n, s.k, s.batch] if problem == "dual_gemm" else [[*size, 1] for size in groups.sizes]
    command = [sys.executable, "-P", "-c", _COMPILE, str(tmp_path), json.dumps(key)]
    environment = {**os.environ, "CUTE_DSL_ARCH": "sm_100a", "CUTE_DSL_DISABLE_FILE_CACHING": "1"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert made.stdout.split()[:1] == ["True"], made.stdout + made.stderr[-2000:]

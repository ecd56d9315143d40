"""Write a GPU MODE submission: one file that holds the package's own code, and imports torch and CuTe DSL only.

A module of the package with `custom_kernel` is taken with all it uses: of every module only the statements that are reached
by name, in their own text. Three things of the text change: imports of the package go, `module.name` of such a module becomes
`name`, and annotations of modules that postpone their evaluation become strings, since device code needs its own evaluated.
A name that two modules give different meanings gets the second module's name behind it.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files

__all__ = ["PROBLEMS", "SHAPE_TABLES", "export"]

_PACKAGE = "glu4"
PROBLEMS = {
    "dual_gemm": "glu4.backends.blackwell.contest_kernel",
    "group_gemm": "glu4.backends.blackwell.grouped_contest_kernel",
}
SHAPE_TABLES = ("default",)
_LEADERBOARDS = {"dual_gemm": "nvfp4_dual_gemm", "group_gemm": "nvfp4_group_gemm"}
_BUILTINS = frozenset(dir(builtins))


@dataclass(eq=False)
class _Source:
    """One module: its text, and its top-level statements by the names that they define."""

    name: str
    text: str
    kept: dict[int, ast.stmt] = field(default_factory=dict)  # by first line
    renamed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]

    @cached_property
    def postponed(self) -> bool:
        return any(isinstance(s, ast.ImportFrom) and s.module == "__future__" for s in self.tree.body)

    @cached_property
    def defined(self) -> dict[str, ast.stmt]:
        found: dict[str, ast.stmt] = {}
        for statement in self.tree.body:
            for name in _targets(statement):
                found[name] = statement
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[ast.stmt, str, str | None]]:
        """Of every name that an import binds, at any depth: (statement, module, name in it or None for the module)."""
        found: dict[str, tuple[ast.stmt, str, str | None]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                for alias in node.names:
                    found[alias.asname or alias.name] = (node, str(node.module), alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name.partition(".")[0]] = (node, alias.name, None)
        return found


def _targets(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target] if isinstance(
        statement, ast.AnnAssign) else []  # fmt: skip
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def _meaning(statement: ast.stmt, name: str) -> str:
    """What a statement makes of a name: of `a, b = c, d` the one value."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            return next(ast.dump(v) for t, v in zip(target.elts, value.elts) if isinstance(t, ast.Name) and t.id == name)
        if isinstance(target, ast.Name):
            return ast.dump(value)
    return ast.dump(statement)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == _PACKAGE


class _Bundle:
    """Everything that one module reaches."""

    def __init__(self, root: str) -> None:
        self.sources: dict[str, _Source] = {}
        self.order: list[_Source] = []  # a module after those that it imports
        self.outside: set[str] = set()  # import statements of other packages
        source = self.source(root)
        for statement in source.tree.body:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)):
                self.keep(source, statement)
        self._finish(source, set())
        self._rename()

    def source(self, name: str) -> _Source:
        if name not in self.sources:
            path = files(_PACKAGE).joinpath(*name.split(".")[1:-1], f"{name.rpartition('.')[2]}.py")
            self.sources[name] = _Source(name, path.read_text(encoding="utf-8"))
        return self.sources[name]

    def _is_module(self, name: str) -> bool:
        *parents, last = name.split(".")[1:]
        return files(_PACKAGE).joinpath(*parents, f"{last}.py").is_file()

    def keep(self, source: _Source, statement: ast.stmt) -> None:
        """A top-level statement and what it reaches."""
        if statement.lineno in source.kept or _targets(statement) == ["__all__"]:
            return
        source.kept[statement.lineno] = statement
        skipped = _annotation_nodes(statement) if source.postponed else set()
        for node in _global_nodes(statement, skipped):
            if isinstance(node, ast.Attribute):
                module = self._module_of(source, _name(node.value))
                if module is not None:
                    self.reach(self.source(module), node.attr)
            elif self._module_of(source, _name(node)) is None:
                self.reach(source, _name(node))

    def _module_of(self, source: _Source, name: str) -> str | None:
        """The module of this package that a name stands for."""
        if name not in source.imports:
            return None
        _, module, part = source.imports[name]
        whole = f"{module}.{part}" if part else module
        return whole if _is_ours(whole) and self._is_module(whole) else None

    def reach(self, source: _Source, name: str) -> None:
        if name in source.defined:
            self.keep(source, source.defined[name])
        elif name in source.imports:
            statement, module, part = source.imports[name]
            if _is_ours(module):
                self.reach(self.source(module), str(part))
            elif statement in source.tree.body:
                self.outside.add(_one_import(module, part, name))

    def _finish(self, source: _Source, seen: set[str]) -> None:
        seen.add(source.name)
        for _, module, part in source.imports.values():
            whole = f"{module}.{part}"
            used = whole if whole in self.sources else module
            if used in self.sources and used not in seen:
                self._finish(self.sources[used], seen)
        self.order.append(source)

    def _rename(self) -> None:
        taken: dict[str, str] = {}
        for source in self.order:
            for line, statement in sorted(source.kept.items()):
                names = _targets(statement)
                if names and all(taken.get(name) == _meaning(statement, name) for name in names):
                    del source.kept[line]  # it is there already
                for name in names:
                    what = _meaning(statement, name)
                    if taken.setdefault(name, what) != what:
                        source.renamed[name] = f"{name}_{source.short}"
                        taken[source.renamed[name]] = what

    def name_of(self, source: _Source, name: str) -> str:
        """What a name of a module is called in the file."""
        if name in source.defined:
            return source.renamed.get(name, name)
        if name in source.imports:
            _, module, part = source.imports[name]
            if _is_ours(module) and module in self.sources and part:
                return self.name_of(self.sources[module], part)
        return name

    def texts(self, replaced: dict[str, str]) -> Iterator[tuple[_Source, list[str]]]:
        """Each module's statements, changed; `replaced`: text in place of the statement that defines a name of the root."""
        written: set[str] = set()
        for source in self.order:
            found = []
            for line in sorted(source.kept):
                statement = source.kept[line]
                names = _targets(statement)
                text = replaced[names[0]] if source is self.order[-1] and names and names[0] in replaced else None
                text = text or self._text(source, statement)
                if text not in written:
                    found.append(text)
                    written.add(text)
            yield source, found

    def _text(self, source: _Source, statement: ast.stmt) -> str:
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        lines = source.text.splitlines()
        changes = sorted(self._changes(source, statement), reverse=True)
        for row, begin, end_row, end, new in changes:
            data = lines[row - 1].encode()
            if row == end_row:
                lines[row - 1] = (data[:begin] + new.encode() + data[end:]).decode()
            else:
                lines[row - 1 : end_row] = [(data[:begin] + new.encode() + lines[end_row - 1].encode()[end:]).decode()] + [
                    "\0"
                ] * (end_row - row)
        assert statement.end_lineno is not None
        kept = [line for line in lines[first - 1 : statement.end_lineno] if line != "\0"]
        return "\n".join(kept)

    def _changes(self, source: _Source, statement: ast.stmt) -> Iterator[tuple[int, int, int, int, str]]:
        """(line, from, last line, to, new text), positions in bytes."""
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and statement.name in source.renamed:
            at = source.text.splitlines()[statement.lineno - 1].index(statement.name)
            yield statement.lineno, at, statement.lineno, at + len(statement.name), source.renamed[statement.name]
        for node in _annotations(statement) if source.postponed else ():
            text = ast.unparse(node)
            yield (*_span(node), repr(text) if '"' in text else f'"{text}"')
        for inner in ast.walk(statement):
            if isinstance(inner, ast.ImportFrom) and _is_ours(str(inner.module)):
                yield (*_span(inner), "pass")
        for node in _global_nodes(statement, _annotation_nodes(statement) if source.postponed else set()):
            if isinstance(node, ast.Attribute):
                module = self._module_of(source, _name(node.value))
                if module is not None:
                    yield (*_span(node), self.name_of(self.sources[module], node.attr))
            elif self._module_of(source, _name(node)) is None:
                new = self.name_of(source, _name(node))
                if new != _name(node):
                    yield (*_span(node), new)


def _span(node: ast.expr | ast.stmt) -> tuple[int, int, int, int]:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _annotations(statement: ast.stmt) -> Iterator[ast.expr]:
    for node in ast.walk(statement):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def _annotation_nodes(statement: ast.stmt) -> set[int]:
    return {id(n) for a in _annotations(statement) for n in ast.walk(a)}


def _name(node: ast.expr) -> str:
    assert isinstance(node, ast.Name)
    return node.id


def _global_nodes(node: ast.AST, skipped: set[int], local: frozenset[str] = frozenset()) -> Iterator[ast.expr]:
    """Names that are no function's own, and `name.attribute` of such; without nodes in `skipped`."""
    if id(node) in skipped:
        return
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        local |= _own(node)
    if isinstance(node, ast.Name):
        if node.id not in local:
            yield node
        return
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in local:
        yield node
    fields = frozenset(n for s in node.body for n in _targets(s)) if isinstance(node, ast.ClassDef) else frozenset()
    for child in ast.iter_child_nodes(node):
        # a method does not see its class's names
        yield from _global_nodes(child, skipped, local if isinstance(child, ast.FunctionDef) else local | fields)


def _own(function: ast.FunctionDef | ast.Lambda) -> frozenset[str]:
    """Names that a function binds: arguments and what it assigns, inner functions' too; not what it imports."""
    found = {n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg)}
    for n in ast.walk(function):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            found.add(n.id)
        elif isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and n is not function and n.name:
            found.add(n.name)
    return frozenset(found)


def _one_import(module: str, part: str | None, name: str) -> str:
    if part is None:
        return f"import {module}" + (f" as {name}" if name != module.partition(".")[0] else "")
    return f"from {module} import {part}" + (f" as {name}" if name != part else "")


# ---- the file ----


def export(problem: str = "dual_gemm", shape_table: str = "default") -> str:
    """The text of a submission. Raises ValueError for a problem or table that is not known."""
    from glu4 import __version__

    if problem not in PROBLEMS:
        raise ValueError(f"problem: expected one of {', '.join(PROBLEMS)}, got {problem!r}")
    if shape_table not in SHAPE_TABLES:
        raise ValueError(f"shape_table: expected one of {', '.join(SHAPE_TABLES)}, got {shape_table!r}")
    bundle = _Bundle(PROBLEMS[problem])
    head = [f"#!POPCORN leaderboard {_LEADERBOARDS[problem]}", "#!POPCORN gpus B200", ""]
    head.append(
        f"# Written by glu4 {__version__}, glu4 export-submission: kernel and host code, of which each part names its file."
    )
    head += ["# The kernel has been run in emulation only. Annotations in quotes name types that may not be in this file.", ""]
    parts = ["\n".join([*head, *sorted(bundle.outside, key=lambda line: (line.split()[1], line))])]
    for source, texts in bundle.texts({"TABLE": _table(problem, shape_table)}):
        if texts:
            place = source.name.replace(".", "/") + ".py"
            parts.append(f"# ---- {place} ----")
            parts += texts
    return "\n\n\n".join(parts) + "\n"


def _table(problem: str, name: str) -> str:
    """Configurations of the public shapes."""
    from glu4.backends.blackwell import config, grouped_config
    from glu4.bench.suites import dual_problem
    from glu4.verify import contest

    assert name == "default"
    if problem == "dual_gemm":
        shapes = dict.fromkeys((*contest.DUAL_BENCHMARKS, *contest.DUAL_TESTS))
        rows = [f"    ({s.m}, {s.n}, {s.k}, {s.batch}): {next(config.candidates(dual_problem(s)))!r}," for s in shapes]
    else:
        groups = dict.fromkeys((*contest.GROUP_BENCHMARKS, *contest.GROUP_TESTS))
        rows = [f"    {tuple((*s, 1) for s in g.sizes)}: {next(grouped_config.candidates(g.sizes))!r}," for g in groups]
    return "\n".join(["TABLE = {", *rows, "}"])

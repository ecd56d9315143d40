"""`glu4 emulate`: run a kernel's PTX with no GPU, under several schedules, and name the hazards that are found."""

from __future__ import annotations

import json as json_module
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glu4.cli.output import JsonOption, console, emit_json, progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glu4.emulator import Hazard, Report, Result
    from glu4.emulator.program import Program

    Buffers = dict[str, NDArray[Any]]

__all__ = ["command"]

DIFFERENT = "results differ between schedules"
_SCHEDULES = ("eager", "lazy", "random")
_FOUND = 3  # exit code

KernelArgument = Annotated[Path | None, typer.Argument(metavar="KERNEL.ptx", help="PTX text of any compiler or author.")]
LaunchOption = Annotated[
    Path | None, typer.Option("--launch", metavar="FILE", help="JSON: grid, block, buffers and parameters (docs/emulator.md).")
]
InputsOption = Annotated[
    Path | None,
    typer.Option("--inputs", metavar="FILE", help="An .npz with arrays by the buffers' names; the others start unwritten."),
]
OutputsOption = Annotated[
    Path | None, typer.Option("--outputs", metavar="FILE", help="An .npz for every buffer after the first schedule's run.")
]
ReportOption = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="JSON for what each schedule found, and how to repeat it.")
]
SchedulesOption = Annotated[
    int | None,
    typer.Option("--schedules", metavar="N", min=1, help="Eager, lazy, then random ones, to N in all. Without it: 3."),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Seed of the first random schedule.")]
ScheduleOption = Annotated[
    str | None,
    typer.Option(
        "--schedule", metavar="NAME", help="eager, lazy or random: only this one, with --seed; repeats a run of a report."
    ),
]
CtasOption = Annotated[
    str | None,
    typer.Option("--ctas", metavar="X,Y;X,Y", help="Run only these CTAs of the grid, with the others of their clusters."),
]
TimelineOption = Annotated[
    Path | None,
    typer.Option("--timeline", metavar="FILE", help="An HTML page of the first run that found something, or of the first."),
]
InstructionsOption = Annotated[
    int, typer.Option("--max-instructions", metavar="N", min=1, help="Warp instructions after which a run is ended.")
]
TimeOption = Annotated[
    float | None, typer.Option("--time-limit", metavar="SECONDS", min=0, help="Time after which each schedule's run is ended.")
]
MemoryOption = Annotated[
    float, typer.Option("--memory-limit", metavar="GIB", min=0, help="Memory for what the launch describes, and for its run.")
]
KernelOption = Annotated[
    str | None,
    typer.Option("--kernel", metavar="NAME", help="sm100_[grouped_]dual_gemm_w4a4, sm100_[grouped_]linear_w4a4: compiled now."),
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", metavar="FIELD=VALUE,..", help="Of --kernel: changes of the shape's default.")
]
ShapeOption = Annotated[
    str | None, typer.Option("--shape", metavar="M,N,K[,L]", help="Of --kernel; of a grouped one ROWS,N,K,EXPERTS.")
]
TilesOption = Annotated[
    int | None,
    typer.Option("--tiles", metavar="N", min=1, help="Of --kernel: tiles of the output, corners first; 2 without it."),
]
ExampleOption = Annotated[
    Path | None,
    typer.Option("--example", metavar="DIR", help="Write a kernel, its twin with a race, a launch and inputs there; run none."),
]


@dataclass(frozen=True)
class _Run:
    """What one schedule's run left. hazards: of the report, and a difference from the first clean run."""

    report: Report
    hazards: tuple[Hazard, ...]

    @property
    def repeat(self) -> str:
        seed = f" --seed {self.report.seed}" if self.report.schedule == "random" else ""
        return f"--schedule {self.report.schedule}{seed}"


def command(
    kernel: KernelArgument = None,
    launch: LaunchOption = None,
    inputs: InputsOption = None,
    outputs: OutputsOption = None,
    report: ReportOption = None,
    schedules: SchedulesOption = None,
    seed: SeedOption = 0,
    schedule: ScheduleOption = None,
    ctas: CtasOption = None,
    timeline: TimelineOption = None,
    max_instructions: InstructionsOption = 200_000_000,
    time_limit: TimeOption = None,
    memory_limit: MemoryOption = 8.0,
    example: ExampleOption = None,
    own: KernelOption = None,
    config: ConfigOption = None,
    shape: ShapeOption = None,
    tiles: TilesOption = None,
    json: JsonOption = False,
) -> None:
    """Run a kernel's PTX with no GPU, under several schedules; report races, deadlocks, lifetimes and misuse.

    With --kernel it is compiled and captured here (CuTe DSL and a C compiler), and its numbers are checked as well.

    Exit code 0: clean. 3: a hazard was found, or with --kernel a wrong number. 2: unusable input.
    """
    if example is not None:
        _write_example(example)
        return
    if own is not None:
        used: dict[str, object] = {
            "KERNEL.ptx": kernel,
            "--launch": launch,
            "--inputs": inputs,
            "--outputs": outputs,
            "--report": report,
        }
        used |= {"--ctas": ctas, "--timeline": timeline}
        _refuse(
            [name for name, value in used.items() if value is not None], "of a PTX file, and --kernel names one of glu4's own"
        )
        most = {"max_instructions": max_instructions, "time_limit": time_limit, "memory_limit": int(memory_limit * 2**30)}
        raise typer.Exit(0 if _own(own, config, shape, _plan(schedules, schedule, seed), tiles or 2, most, json) else _FOUND)
    given = {"--config": config, "--shape": shape, "--tiles": tiles}
    _refuse([name for name, value in given.items() if value is not None], "of --kernel")
    if kernel is None or launch is None:
        raise ValueError("give KERNEL.ptx and --launch FILE; --example DIR writes a pair to start from")
    for path in (outputs, report, timeline):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no directory {path.absolute().parent}")
    if timeline is not None and find_spec("jinja2") is None:
        raise ImportError("--timeline needs jinja2: pip install 'glu4[report]'")
    program = _read_kernel(kernel)
    description = _read_launch(launch)
    if ctas is not None:
        description["ctas"] = _indices(ctas)
    arrays = {} if inputs is None else _read_arrays(inputs)
    limits: dict[str, Any] = {"max_instructions": max_instructions, "time_limit": time_limit}
    limits["memory_limit"] = int(memory_limit * 2**30)
    plan = _plan(schedules, schedule, seed)

    def run(name: str, number: int, record: bool = False) -> Result:
        return _emulate(program, description, arrays, launch, schedule_name=name, seed=number, record=record, **limits)

    with progress("emulating", total=len(plan)) as advance:
        runs, first = _all(plan, run, lambda text: advance(1, text))
    if outputs is not None:
        _write_arrays(outputs, first)
    document = _document(kernel, launch, description, runs)
    if report is not None:
        _write(report, json_module.dumps(document, indent=2) + "\n")
    if timeline is not None:
        shown = next((r for r in runs if r.hazards), runs[0])
        drawn = run(shown.report.schedule, shown.report.seed, record=True)
        _write_timeline(timeline, drawn, f"{kernel.name}: {shown.report.schedule}, seed {shown.report.seed}")
    if json:
        emit_json(document)
    else:
        _print(runs)
    raise typer.Exit(_FOUND if any(r.hazards for r in runs) else 0)


def _own(
    kernel: str,
    config: str | None,
    shape: str | None,
    plan: list[tuple[str, int]],
    tiles: int,
    most: dict[str, Any],
    json: bool,
) -> bool:
    """Compile and emulate one of glu4's own kernels; whether all is right."""
    from glu4.cli import experts
    from glu4.cli import tiles as dense

    known = (*dense.KERNELS, *experts.KERNELS)
    if kernel not in known:
        raise ValueError(f"--kernel: expected one of {', '.join(known)}, got {kernel!r}")
    if kernel in experts.KERNELS:
        return experts.emulate_experts(kernel, config, shape, plan, most, json)
    return dense.emulate_kernel(kernel, config, shape, plan, tiles, most, json)


def _refuse(given: list[str], why: str) -> None:
    if given:
        raise ValueError(f"{', '.join(given)}: options {why}")


# running


def _plan(count: int | None, name: str | None, seed: int) -> list[tuple[str, int]]:
    """(schedule, seed) of each run."""
    if name is None:
        first = [("eager", seed), ("lazy", seed)]
        total = 3 if count is None else count
        return (first + [("random", seed + i) for i in range(total - 2)])[:total]
    if name not in _SCHEDULES:
        raise ValueError(f"--schedule: expected one of {', '.join(_SCHEDULES)}, got {name!r}")
    if name != "random" and (count or 1) > 1:
        raise ValueError(f"--schedules: there is one schedule {name}; leave --schedules out")
    return [(name, seed + i) for i in range(count or 1)]


def _emulate(
    program: Program, description: Mapping[str, Any], arrays: Mapping[str, Any], launch: Path, **options: Any
) -> Result:
    from glu4.emulator import LaunchError, emulate

    try:
        return emulate(program, description, arrays, **options)
    except LaunchError as error:
        raise ValueError(f"{launch}: {error}") from None


def _all(plan: list[tuple[str, int]], run: Any, advance: Any) -> tuple[list[_Run], Buffers]:
    """Every run of the plan, and the buffers after the first one. Of a run's machine, which may be large, nothing is kept."""
    runs: list[_Run] = []
    first: Buffers | None = None
    clean: tuple[Buffers, Report] | None = None
    for name, seed in plan:
        result: Result = run(name, seed)
        found = result.report.hazards
        if not found and clean is not None:
            found = _difference(*clean, result.buffers, result.report)
        elif not found:
            clean = (result.buffers, result.report)
        first = first or result.buffers
        runs.append(_Run(result.report, found))
        advance(f"emulating: {name}, seed {seed}")
    return runs, first or {}


def _difference(mine: Buffers, a: Report, theirs: Buffers, b: Report) -> tuple[Hazard, ...]:
    """A hazard that names the first element in which two clean runs differ, or none."""
    import numpy as np

    from glu4.emulator import Hazard

    for name, array in mine.items():
        before, after = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (array, theirs[name]))
        bad = np.flatnonzero(before != after)
        if bad.size:
            place = np.unravel_index(int(bad[0]) // array.itemsize, array.shape)
            index = [int(i) for i in place]
            count = np.unique(bad // array.itemsize).size
            message = (
                f"{name}{index} is {theirs[name][place]} under {b.schedule} seed {b.seed}, "
                f"{array[place]} under {a.schedule} seed {a.seed}; {count} of {array.size} elements differ"
            )
            return (Hazard(DIFFERENT, message),)
    return ()


# reading


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _read_kernel(path: Path) -> Program:
    from glu4.emulator import PtxError, load

    try:
        return load(_text(path).rstrip("\0"))  # an image in memory ends in a zero, and some tools write it out
    except PtxError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_launch(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        found = json_module.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object with grid, block, buffers and params")
    return found


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    import numpy as np

    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name; write it with numpy.savez")
        with archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path}: cannot be read as .npz ({reason})") from None


def _indices(text: str) -> list[list[int]]:
    try:
        return [[int(v) for v in part.split(",")] for part in text.split(";")]
    except ValueError:
        raise ValueError(f"--ctas: expected indices such as 0,0;3,1, got {text!r}") from None


# writing


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None


def _write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """As numpy.savez, whose own parameters would clash with some buffers' names."""
    import numpy as np

    try:
        with zipfile.ZipFile(path, "w") as out:
            for name, array in arrays.items():
                with out.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None


def _write_timeline(path: Path, result: Result, title: str) -> None:
    from glu4.emulator.timeline import render

    assert result.recording is not None
    _write(path, render(result.recording, title))


def _document(kernel: Path, launch: Path, description: Mapping[str, Any], runs: list[_Run]) -> dict[str, Any]:
    import glu4
    from glu4.emulator.launch import hazard_to_dict

    head: dict[str, Any] = {"tool": "glu4 emulate", "version": glu4.__version__, "kernel": str(kernel), "launch": str(launch)}
    head |= {"entry": description.get("entry"), "ctas": description.get("ctas")}
    each = [
        r.report.to_dict() | {"clean": not r.hazards, "repeat": r.repeat, "hazards": [hazard_to_dict(h) for h in r.hazards]}
        for r in runs
    ]
    return {**head, "clean": not any(r.hazards for r in runs), "schedules": each}


def _print(runs: list[_Run]) -> None:
    """A line for each run, and each hazard once."""
    found: dict[Any, list[tuple[_Run, Hazard]]] = {}
    for run in runs:
        report = run.report
        name = f"{report.schedule}, seed {report.seed}" if report.schedule == "random" else report.schedule
        what = "clean" if not run.hazards else f"{len(run.hazards)} hazard{'s' * (len(run.hazards) > 1)}"
        _line(f"{name}: {what}, {report.instructions} warp instructions in {report.seconds:.2f} s")
        for h in run.hazards:
            key = (h.kind, h.access and h.access.line, h.other and h.other.line, None if h.access else h.message)
            found.setdefault(key, []).append((run, h))
    for group in found.values():
        run, hazard = group[0]
        _line(f"\n{hazard}\n  in {len(group)} of {len(runs)} schedules; again: {run.repeat}")
    if not found:
        _line(f"no hazard under {len(runs)} schedule{'s' * (len(runs) > 1)}")


def _line(text: str) -> None:
    """Names in a PTX text may hold what a terminal would obey."""
    safe = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    console.print(safe, markup=False, highlight=False, soft_wrap=True)


# the example


def _write_example(folder: Path) -> None:
    """scale.ptx, racy.ptx (the same without its last barrier), launch.json, in.npz."""
    from importlib.resources import files

    import numpy as np

    source = files("glu4.emulator") / "example"
    kernel = (source / "scale.ptx").read_text(encoding="utf-8")
    before, barrier, after = kernel.rpartition("    bar.sync 0;\n")
    assert barrier
    texts = {
        "scale.ptx": kernel,
        "racy.ptx": before + "    // bar.sync 0 is missing here: the other warps may still be scaling\n" + after,
        "launch.json": (source / "launch.json").read_text(encoding="utf-8"),
    }
    taken = [name for name in (*texts, "in.npz") if (folder / name).exists()]
    if taken:
        raise ValueError(f"{folder / taken[0]}: exists; --example writes into a new directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made ({error.strerror})") from None
    for name, text in texts.items():
        _write(folder / name, text)
    _write_arrays(folder / "in.npz", {"X": np.random.default_rng(0).standard_normal(4096, np.float32)})
    _line(f"wrote {', '.join(texts)} and in.npz to {folder}; run it:")
    _line(f"  glu4 emulate {folder / 'scale.ptx'} --launch {folder / 'launch.json'} --inputs {folder / 'in.npz'}")

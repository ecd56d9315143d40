"""Record the predictions of the Blackwell model and how they agree with public times; no GPU is used.

    python benchmarks/model_sm100.py [--output benchmarks/results/model-sm100.json] [--document docs/model-sm100.md]

`--document` writes the tables between the marks of the document.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import glu4
from glu4.backends.blackwell.config import candidates
from glu4.bench.devices import device
from glu4.bench.model_sm100 import RATES, predict
from glu4.bench.published_sm100 import (
    ABLATIONS,
    CALIBRATION,
    HELD_OUT,
    TEMPLATE_US,
    Agreement,
    Public,
    best_public,
    calibrate,
    evaluate,
    label,
    limits_agreement,
    prediction,
)
from glu4.bench.roofline import limit
from glu4.bench.suites import dual_problem, group_problems
from glu4.verify.contest import DUAL_BENCHMARKS, GROUP_BENCHMARKS, DualShape

# one change each of the default of (256, 4096, 7168) and (512, 4096, 7168)
CHANGES: dict[str, dict[str, Any]] = {
    "1 CTA": {"ctas": 1, "tile_m": 128, "stages": 0},
    "3 stages": {"stages": 3},
    "1 stage": {"stages": 1, "gate_first": 0},
    "joint barriers": {"barriers": "joint"},
    "gate_first 0": {"gate_first": 0},
    "no collector": {"collector": False},
    "by_matrix": {"order": "by_matrix", "collector": False, "gate_first": 0},
    "tile_k 128": {"tile_k": 128, "stages": 0},
    "load_width 8": {"load_width": 8},
    "load_width 64": {"load_width": 64},
    "TMA store": {"store": "tma", "stages": 0},
    "SiLU by tanh": {"silu": "tanh"},
    "one warp for copies and MMAs": {"warps": "single"},
    "static": {"schedule": "static"},
    "gate_first 0, stream_k": {"gate_first": 0, "schedule": "stream_k"},
    "gate_first 0, split 2": {"gate_first": 0, "split": 2},
    "pdl": {"pdl": True},
    "pdl, early weights": {"pdl": True, "early_weights": True},
}
_SHAPES = DUAL_BENCHMARKS[:2]
# rates that are wrong on purpose: what of them the comparison with public times would show
WRONG: dict[str, dict[str, float]] = {
    "tensor core twice as fast": {"flops": 2 * RATES.flops, "device_flops": 2 * RATES.device_flops},
    "tensor core three times as slow": {"flops": RATES.flops / 3, "device_flops": RATES.device_flops / 3},
    "device memory four times as fast": {"memory": 4 * RATES.memory},
    "device memory twice as slow": {"memory": RATES.memory / 2},
    "copies without latency": {"latency_us": 0.0},
    "copies with five times the latency": {"latency_us": 5 * RATES.latency_us},
    "launches for nothing": {"launch_us": 0.0},
}


def summary(found: Agreement) -> dict[str, Any]:
    whole = {name: getattr(found, name) for name in ("ordered", "pairs", "ordered_of_shape", "pairs_of_shape")}
    return {"rho": round(found.rho, 4)} | whole


def points(kernels: tuple[Public, ...]) -> list[dict[str, Any]]:
    found = []
    for kernel in kernels:
        shapes = GROUP_BENCHMARKS if kernel.group else DUAL_BENCHMARKS
        for i, (shape, us, predicted) in enumerate(zip(shapes, kernel.us, kernel.predicted())):
            point = {"kernel": kernel.name, "shape": label(shape), "config": kernel.configs[i].name, "known": kernel.known}
            found.append(point | {"published_us": us, "predicted_us": round(predicted, 2)})
    return found


def benchmarks() -> list[dict[str, Any]]:
    """Limit, best public result and prediction of each benchmark shape."""
    rows = []
    for shape in (*DUAL_BENCHMARKS, *GROUP_BENCHMARKS):
        problems = [dual_problem(shape)] if isinstance(shape, DualShape) else group_problems(shape)
        found, config = prediction(shape)
        best = best_public(shape)
        row = {"shape": label(shape), "limit_us": round(limit(problems, device("b200-contest")).time_s * 1e6, 3)}
        row |= {"best_public_us": best and best[0], "best_public": best and best[1], "config": config}
        breakdown = {part: round(us, 2) for part, us in found.breakdown.items()}
        rows.append(row | {"predicted_us": round(found.us, 2), "bound_by": found.bound_by, "breakdown": breakdown})
    return rows


def changes() -> list[dict[str, Any]]:
    """The default's prediction after one change each."""
    rows = []
    for name, change in {"default": {}, **CHANGES}.items():
        us = []
        for shape in _SHAPES:
            problem = dual_problem(shape)
            config = replace(next(candidates(problem)), **{k: v for k, v in change.items() if (k, v) != ("stages", 0)})
            if change.get("stages") == 0:  # as many as fit
                config = replace(config, stages=config.most_stages())
            config = replace(config, stages=min(config.stages, config.most_stages()))
            us.append(round(predict(problem, replace(config, gate_first=min(config.gate_first, config.stages))).us, 2))
        rows.append({"change": name, "predicted_us": us})
    return rows


def sensitivity() -> list[dict[str, Any]]:
    """Agreement after each of `WRONG`, and the mean error of the times themselves."""
    rows = []
    for name, wrong in {"as calibrated": {}, **WRONG}.items():
        found = evaluate(rates=replace(RATES, **wrong))
        error = sum(abs(math.log(p[3] / p[2])) for p in found.points) / len(found.points)
        rows.append({"rates": name} | summary(found) | {"mean_error": round(math.exp(error) - 1, 3)})
    return rows


def record() -> dict[str, Any]:
    rates, template = calibrate()
    fitted = {"launch_us": rates.launch_us, "latency_us": rates.latency_us, "template_us": template}
    fitted = {name: round(value, 3) for name, value in fitted.items()}
    held_out = evaluate()
    known = tuple(k for k in HELD_OUT if k.known)
    return {
        "what": "predictions of glu4.bench.model_sm100 for a B200; nothing was run on a GPU",
        "python": platform.python_version(),
        "glu4": glu4.__version__,
        "commit": commit(),
        "method": "rates calibrated on the kernels under calibration, evaluated on those under held_out; times as reported",
        "rates": asdict(RATES),
        "template_us": TEMPLATE_US,
        "fitted": fitted,
        "calibration": {"points": points(CALIBRATION)},
        "held_out": summary(held_out) | {"points": points(HELD_OUT), "wrong": [list(w) for w in held_out.wrong]},
        "held_out_known": summary(evaluate(known)),
        "held_out_dual": summary(evaluate(tuple(k for k in HELD_OUT if not k.group))),
        "limits_only": summary(limits_agreement()),
        "sensitivity": sensitivity(),
        "ablations": {"points": points(ABLATIONS)},
        "benchmarks": benchmarks(),
        "changes": changes(),
    }  # fmt: skip


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=False).stdout
    return (done.stdout.strip() or "unknown") + (" with changes" if changed.strip() else "")


# ---- tables of the document ----


def tables(document: dict[str, Any]) -> dict[str, str]:
    """By the name of their marks."""
    return {
        "benchmarks": _benchmarks(document["benchmarks"]),
        "agreement": _agreement(document),
        "points": _points(document),
        "sensitivity": _sensitivity(document["sensitivity"]),
        "changes": _changes(document["changes"]),
    }


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(str(cell) for cell in line) + " |\n" for line in (head, *rows)]
    return "".join([lines[0], "|---" * len(head) + "|\n", *lines[1:]])


def _benchmarks(rows: list[dict[str, Any]]) -> str:
    found = [
        (r["shape"], r["limit_us"], f"{r['best_public_us']} ({r['best_public']})", r["predicted_us"], r["bound_by"],
         *r["breakdown"].values(), f"`{r['config']}`")
        for r in rows
    ]  # fmt: skip
    head = (
        "shape",
        "limit",
        "best public",
        "prediction",
        "bound by",
        "launch",
        "fill",
        "main loop",
        "epilogue",
        "configuration",
    )
    return _table(head, found)


def _agreement(document: dict[str, Any]) -> str:
    names = {
        "held_out": "all held out",
        "held_out_known": "those whose configuration is published",
        "held_out_dual": "the dual problem's",
        "limits_only": "all held out, by the limit alone",
    }
    rows: list[tuple[Any, ...]] = []
    for key, name in names.items():
        d = document[key]
        rows.append(
            (name, f"{d['rho']:.3f}", f"{d['ordered']} of {d['pairs']}", f"{d['ordered_of_shape']} of {d['pairs_of_shape']}")
        )
    return _table(("points", "Spearman", "pairs in order", "of them of one shape"), rows)


def _points(document: dict[str, Any]) -> str:
    rows: dict[str, list[str]] = {}
    for part in ("calibration", "held_out", "ablations"):
        for p in document[part]["points"]:
            name = p["kernel"] + {"calibration": " (calibration)", "ablations": " (ablation)"}.get(
                part, "" if p["known"] else " *"
            )
            rows.setdefault(name, []).append(f"{p['published_us']} / {p['predicted_us']}")
    return _table(("kernel", "first shape", "second", "third", "fourth"), [(name, *cells) for name, cells in rows.items()])


def _sensitivity(rows: list[dict[str, Any]]) -> str:
    cells = [
        (r["rates"], f"{r['rho']:.3f}", f"{r['ordered']} of {r['pairs']}", f"{r['ordered_of_shape']} of {r['pairs_of_shape']}",
         f"{100 * r['mean_error']:.0f} %")
        for r in rows
    ]  # fmt: skip
    return _table(("rates", "Spearman", "pairs in order", "of them of one shape", "times are off by"), cells)


def _changes(rows: list[dict[str, Any]]) -> str:
    return _table(("change", *(label(s) for s in _SHAPES)), [(r["change"], *r["predicted_us"]) for r in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--document", type=Path)
    args = parser.parse_args()
    document = record()
    for table in tables(document).values():
        print(table)
    for wrong in document["held_out"]["wrong"]:
        print("predicted the other way:", ", ".join(wrong))
    if args.output:
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    if args.document:
        text = args.document.read_text()
        for name, table in tables(document).items():
            begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
            text = text.split(begin)[0] + begin + table + end + text.split(end)[1]
        args.document.write_text(text)


if __name__ == "__main__":
    main()

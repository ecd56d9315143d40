"""The H100's measured table, of the trials that were recorded on one: python benchmarks/h100_table.py

`glu4 tune` has had no H100 yet. `h100-trials-2.json` compares configurations at nine M of one weight shape, in CUDA graphs over
cold copies; an M where two or more that still ship were timed becomes an entry, with the median of the turns' medians.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from glu4.backends.hopper import tuned
from glu4.backends.hopper.config import SHIPPED
from glu4.bench.tune import merged

RECORD = Path(__file__).parent / "results" / "h100-trials-2.json"
N, K = 4096, 7168


def table() -> dict[str, Any]:
    record = json.loads(RECORD.read_text())
    shipped = {config.name for config in SHIPPED}
    times: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in (row for trial in record["trials"] for row in trial["rows"]):
        asked = (row["peer"], row["x"], row["variant"], row["n"], row["k"]) == ("glu4", "float16", "base", N, K)
        if asked and row["config"] in shipped and row["us"]:
            times[row["m"]][row["config"]].append(row["us"])
    by_m = {m: {c: round(statistics.median(us), 3) for c, us in of.items()} for m, of in sorted(times.items()) if len(of) > 1}
    ordered = {m: dict(sorted(us.items(), key=lambda item: item[1])) for m, us in by_m.items()}
    entry = {"operation": "dual_gemm", "n": N, "k": K, "x_format": "float16", "m": list(ordered)}
    entry |= {"config": [next(iter(us)) for us in ordered.values()], "us": list(ordered.values())}
    setting = {key: record[key] for key in ("device", "driver_version", "torch", "commit", "method")}
    return merged(None, record["device"], [entry], setting | {"record": RECORD.name})


if __name__ == "__main__":
    made = table()
    path = tuned.packaged_directory() / tuned.file_name(made["device"])
    path.write_text(json.dumps(made, indent=1) + "\n")
    print(path)

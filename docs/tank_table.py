"""Make the table of docs/shark-tank.md, and the page beside it, anew from the recorded ledgers: python docs/tank_table.py"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from glu4.tank.ledger import Ledger
from glu4.tank.report import outcomes, write

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
_MARKED = re.compile(r"(<!-- outcomes -->\n).*?(<!-- end of outcomes -->)", re.DOTALL)


def main() -> None:
    page = HERE / "shark-tank.md"
    with tempfile.TemporaryDirectory() as directory:
        ledger = Path(directory) / "all.sqlite"
        for recorded in sorted(RESULTS.glob("tank*.sqlite")):
            copied = shutil.copy(recorded, directory)  # SQLite leaves files beside the one that it opens
            Ledger(ledger).merge(Ledger(copied, create=False))
        if ledger.is_file():
            write(ledger, HERE / "shark-tank.html")
        table = outcomes(ledger)
    text = page.read_text(encoding="utf-8")
    made, count = _MARKED.subn(lambda match: match[1] + table + match[2], text)
    if count != 1:
        raise SystemExit(f"{page}: expected one pair of outcomes markers, found {count}")
    page.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()

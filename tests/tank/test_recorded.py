"""The recorded ledgers are sound, and the documentation's table is what they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from glu4.tank.ledger import Ledger
from glu4.tank.report import outcomes

ROOT = Path(__file__).parents[2]
RECORDED = sorted((ROOT / "benchmarks" / "results").glob("tank*.sqlite"))


@pytest.mark.skipif(not RECORDED, reason="no ledger is recorded here")
def test_the_table_is_what_the_ledgers_say(tmp_path):
    whole = Ledger(tmp_path / "all.sqlite")
    for path in RECORDED:
        assert path.stat().st_size < 1 << 20
        copied = Ledger(shutil.copy(path, tmp_path), create=False)
        assert copied.check() == []
        whole.merge(copied)
    assert outcomes(whole.path) in (ROOT / "docs" / "shark-tank.md").read_text(encoding="utf-8")

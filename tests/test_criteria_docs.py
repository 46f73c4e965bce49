"""The example of docs/criteria.md runs as it stands, and its table is that of the results."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_example_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "criteria.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "example.py").write_text(block)
        assert "graph" in runpy.run_path(str(tmp_path / "example.py"))


def test_the_table_shows_the_results() -> None:
    text = (DOCS / "criteria.md").read_text()
    results = json.loads((DOCS / "results" / "criteria.json").read_text())
    for criterion in ("Taylor(form='paper')", "Fisher()"):
        within = results["summary"][criterion]["scored samples"]["within groups"]
        assert f"| `{criterion}` | {within['mean']:.2f} | {within['lowest']:.2f} |" in text
        assert within["lowest"] >= results["bar"]

"""The benchmark of the criteria runs, and Taylor and Fisher rank units like the measured loss increase."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "criteria.py"


@pytest.mark.slow
def test_taylor_and_fisher_agree_with_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "criteria.json"
    options = ["--seeds", "1", "--epochs", "12", "--repeats", "1", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    summary = json.loads(target.read_text())["summary"]
    for criterion in ("Taylor(form='paper')", "Taylor(form='elementwise')", "Fisher()"):
        assert summary[criterion]["scored samples"]["within groups"]["lowest"] >= 0.8
    assert abs(summary["Random(seed=0)"]["scored samples"]["within groups"]["mean"]) < 0.3


def test_spearman_shares_ranks_of_equal_values() -> None:
    spearman = runpy.run_path(str(SCRIPT))["spearman"]
    rising = torch.tensor([1.0, 2, 3, 4])
    assert spearman(rising, rising.exp()) == pytest.approx(1)
    assert spearman(rising, -rising) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0, 1, 2, 2]), rising) == pytest.approx(0.8944272)  # scipy.stats.spearmanr
    assert spearman(torch.ones(4), rising) == 0

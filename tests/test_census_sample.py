"""A few real networks of the census, the isolation of its processes, and its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.judging import isolate
from benchmarks.judging.judge import judge, reloaded
from benchmarks.judging.tables import bars, table
from benchmarks.suites import SUITES, cases, find

ROOT = Path(__file__).resolve().parents[1]
TORCHVISION = [
    ("classification", "mobilenet_v3_small"),
    ("classification", "shufflenet_v2_x0_5"),
    ("classification", "squeezenet1_1"),
    ("segmentation", "lraspp_mobilenet_v3_large"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("suite", "name"), TORCHVISION, ids=lambda value: value)
def test_torchvision(suite, name, tmp_path):
    case = find(suite, name)
    row = judge(case, tmp_path)
    assert row["status"] == "right", row
    assert row["covered"] >= 0.9
    assert reloaded(case, tmp_path).get("status", "right") == "right"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("library", "suite", "name"),
    [
        ("timm", "timm", "vit_tiny_patch16_224"),
        ("transformers", "transformers", "LlamaForCausalLM"),
        ("transformers", "transformers", "T5ForConditionalGeneration"),
    ],
    ids=lambda value: value,
)
def test_other_libraries(library, suite, name, tmp_path):
    pytest.importorskip(library)
    row = judge(find(suite, name), tmp_path)
    assert row["status"] == "right", row


def test_every_suite_lists_cases():
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    count = {suite: len(cases(suite)) for suite in SUITES}
    assert count["classification"] >= 80
    assert count["segmentation"] >= 6
    assert count["detection"] >= 12
    assert count["video"] >= 10
    assert count["timm"] >= 120
    assert count["transformers"] >= 25
    for suite in SUITES:
        names = [case.name for case in cases(suite)]
        assert len(names) == len(set(names))


def _dies(how):
    if how == "crash":
        os._exit(11)
    if how == "raise":
        raise ValueError("as asked")
    if how == "hang":
        import time

        time.sleep(60)
    if how == "memory":
        return {"size": len(bytearray(3 * 2**30))}
    return {"status": "right"}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("crash", "exit code 11"),
        ("raise", "as asked"),
        ("hang", "took more than"),
        ("memory", "MemoryError"),
        ("", ""),
    ],
)
def test_a_crash_is_a_row(how, reason):
    row = isolate.isolated(_dies, how, timeout=25 if how == "hang" else 60, memory=2)
    assert row["status"] == ("error" if how else "right")
    assert reason in row.get("reason", "")


def test_command_line_resumes(tmp_path):
    path = tmp_path / "census.json"
    old = {"awkward": {"GLU": {"status": "wrong", "reason": "kept from before"}}}
    path.write_text(json.dumps(old))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.census", "--suite", "awkward", "--only", "G[LR]U", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["awkward"]
    assert rows["GLU"] == old["awkward"]["GLU"]
    assert rows["GRU"]["status"] == "right"
    assert rows["GRU"]["loaded"]
    assert "NOT MET" in done.stdout


def test_tables():
    rows = {"a": {"status": "right", "covered": 1.0, "dense": 10, "kept": 5, "seconds": 1.0}, "b": {"status": "frozen"}}
    assert "0.50" in table("awkward", rows)
    assert "NOT MET" in bars({"awkward": rows})
    assert "NOT MET" not in bars({"awkward": {"a": rows["a"]}})
    assert "NOT MET" in bars({"timm": rows})

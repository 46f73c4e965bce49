"""The report: from records only, self-contained, whole at every stage of a run."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secateur.report import render
from secateur.report.figures import Line, Mark, chart, ticks
from secateur.report.view import comparison, view
from secateur.track.local import Log, read
from secateur.types import CheckpointError, Record, SecateurError


def records() -> list[Record]:
    """What a run of two cuts writes, with a name that wants to be a tag."""
    measured = {"unit": "fraction", "n": 100, "spread": 0.01, "device": "cpu", "how": "all <images>"}
    quality = {"loss": 0.5, "top1": 0.9, "top5": 1.0, "n": 100}
    figures = {"train_loss": 1.0, "train_accuracy": 0.5, "validation_loss": 1.5, "validation_accuracy": 0.4}
    recipe = json.loads(
        '{"name": "<b>bold</b>", "train": {"epochs": 1, "optimizer": "adam", "lr": 0.1, "rate": "cosine", '
        '"batch_size": 8}, "prune": {"criterion": {"name": "taylor", "args": {}, "samples": 5}, "budget": '
        '{"units": 0.5, "params": null}, "allocation": "global", "round_to": null, "min_units": 1, "schedule": '
        '{"name": "once", "steps": 2}}, "recover": {"name": "finetune"}}'
    )
    groups = [
        {"name": "conv", "units": 8, "kind": "channel", "exact": True, "frozen": None},
        {"name": "fc", "units": 10, "kind": "neuron", "exact": True, "frozen": "output of the model"},
    ]
    rows: list[tuple[str, dict]] = [
        (
            "run",
            {"recipe": recipe, "hash": "abc", "device": "cpu", "threads": 1, "platform": "p", "versions": {}},
        ),
        (
            "data",
            {"name": "digits", "classes": ["a"], "shape": [1, 8, 8], "train": 5, "validation": 5, "test": 5},
        ),
        ("model", {"name": "s3", "groups": groups, "seconds": 0.1, "params": 1000, "macs": 2000}),
        ("epoch", {"step": 0, "epoch": 0, **figures}),
        ("dense", quality),
    ]
    for step, kept in ((1, 6), (2, 4)):
        cut = {
            "step": step,
            "budget": {"units": kept / 8},
            "achieved": {"units": kept / 8, "params": 0.5, "macs": 0.4},
        }
        proof = [{"group": "conv", "kind": "permutation", "error": None, "tolerance": 1e-5, "ok": True}]
        cut |= {"groups": [{"name": "conv", "units": 8, "kept": kept}], "notes": ["a note"], "proof": proof}
        rows += [("cut", {**cut, "before": quality, "after": {**quality, "top1": 0.3}})]
        rows += [("epoch", {"step": step, "epoch": 0, **figures}), ("recovered", {"step": step, **quality})]
    both = {
        name: [
            {"name": "test top1", "value": 0.9 - less, **measured},
            {"name": "params", "value": 1000.0 - 500 * less * 10, **measured, "unit": "params"},
        ]
        for name, less in (("dense", 0.0), ("pruned", 0.1))
    }
    layer = {"name": "conv", "kind": "Conv2d", "output": [1, 8], "params": 80}
    layers = {"dense": [layer], "pruned": [{**layer, "params": 20}]}
    rows.append(("measure", {"measurements": both, "layers": layers, "warnings": ["NOT FASTER: it is slow"]}))
    return [Record(stage, data, 1000.0 + i) for i, (stage, data) in enumerate(rows)]


class Closed(HTMLParser):
    """Checks that every opened element is closed in order."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("count", range(3, len(records()) + 1))
def test_the_page_is_whole_after_every_record(count: int) -> None:
    page = render(records()[:count])
    parser = Closed()
    parser.feed(page)
    assert parser.open == []
    assert parser.links == []
    assert "http" not in re.sub(r"<!doctype html>", "", page)
    assert ("not finished" in page) is (count < len(records()))


def test_the_page_says_what_was_cut_and_what_it_bought() -> None:
    page = render(records())
    for text in ("4 of 8", "50.0 %", "90.00", "80.00 %", "-10.00 points", "NOT FASTER", "a note", "75.0 %"):
        assert text in page, text
    assert "<b>bold</b>" not in page
    assert "&lt;b&gt;bold" in page
    assert page.count("<svg") == 2
    assert page.count('line class="cut"') == 4


def test_the_page_says_where_the_evidence_came_from() -> None:
    rows = records()
    assert "taylor, on 5 training images at most" in render(rows)
    rows[0].data["recipe"]["prune"]["criterion"] |= {"evidence": "training", "worst": True}
    page = render(rows)
    assert "taylor, turned round (a control), gathered in the training before the cut" in page
    assert "images at most" not in page


def test_points_of_the_curves_stand_where_the_values_are() -> None:
    svg = chart("t", [Line("a", "train", [(0, 0.0), (10, 1.0)])], [Mark(5, "cut 1")])
    (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in re.search(r'points="([^"]+)"', svg)[1].split())  # type: ignore[index]
    assert x1 < x2
    assert y1 > y2
    cut = float(re.search(r'line class="cut" x1="([\d.]+)"', svg)[1])  # type: ignore[index]
    assert cut == pytest.approx((x1 + x2) / 2)


def test_labels_of_close_marks_do_not_overlap() -> None:
    svg = chart("t", [Line("a", "train", [(0, 0.0), (1000, 1.0)])], [Mark(k, f"cut {k}") for k in range(0, 1000, 5)])
    places = [float(x) for x in re.findall(r'text class="cut middle" x="([\d.]+)"', svg)]
    assert svg.count('line class="cut"') == 200
    assert min(b - a for a, b in itertools.pairwise(places)) > 40


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.33), (-5, 1e6), (1e-9, 2e-9), (3, 3)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_a_chart_without_points_is_empty_and_a_flat_one_is_not() -> None:
    assert chart("t", [Line("a", "train", [])], []) == ""
    assert "nan" not in chart("t", [Line("a", "train", [(1, 0.5)])], [], percent=True)


def test_comparison_tells_better_from_worse() -> None:
    rows = {row["key"]: row for row in view(records())["rows"]}
    assert rows["test top1"]["good"] is False
    assert rows["params"]["good"] is True
    assert rows["params"]["change"] == "-50.0 %"
    assert comparison({}) == []


def test_no_records_no_page() -> None:
    with pytest.raises(SecateurError, match="no records"):
        render([])


def test_the_report_loads_no_model() -> None:
    code = (
        "import sys, secateur.report; "
        "print([m for m in sys.modules if m.startswith(('secateur.models', 'secateur.checkpoint'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_log_keeps_what_belongs_to_a_state_and_drops_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    log = Log(path)
    for number in range(4):
        log.append("epoch", number=number, bad=float("nan"))
    with open(path, "ab") as file:
        file.write(b'{"stage": "torn')  # a crash while writing
    assert [r.data["number"] for r in read(path)] == [0, 1, 2, 3]
    assert read(path)[0].data["bad"] is None
    Log(path, keep=2).append("epoch", number=9)
    assert [r.data["number"] for r in read(path)] == [0, 1, 9]
    with pytest.raises(CheckpointError, match="holds"):
        Log(path, keep=7)


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"stage": "run", "time": 1}\nhello\n')
    with pytest.raises(CheckpointError, match=r"records\.jsonl:2"):
        read(path)
    with pytest.raises(CheckpointError, match="folder of a run"):
        read(tmp_path / "none.jsonl")

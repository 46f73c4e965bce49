"""A comparison over the epochs: what the records say of a run's course, and what is drawn of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secateur.compare import compare
from secateur.report.arms import DENSE, RANDOM, SCRATCH, WHOLE
from secateur.report.compared import render
from secateur.report.course import course
from secateur.report.figures import HEIGHT, WIDTH
from secateur.report.over_epochs import SHOWN, OverEpochs, over_epochs
from secateur.report.strands import steps
from secateur.types import Record
from test_compare import run as finished

GROUPS = {"1": 50, "3": 30}


def epoch(step: int, accuracy: float, seconds: float = 1.0) -> dict:
    return {
        "stage": "epoch",
        "step": step,
        "epoch": 0,
        "train_accuracy": accuracy + 0.02,
        "validation_accuracy": accuracy,
        "seconds": seconds,
    }


def cut(step: int, kept: dict[str, int], after: float = 0.4) -> dict:
    rows = [{"name": name, "units": GROUPS.get(name, 64), "kept": units} for name, units in kept.items()]
    return {"stage": "cut", "step": step, "groups": rows, "before": {"top1": 0.8}, "after": {"top1": after}}


def model(groups: dict[str, int] = GROUPS) -> dict:
    rows = [{"name": name, "units": units, "frozen": ""} for name, units in groups.items()]
    return {"stage": "model", "groups": [*rows, {"name": "out", "units": 10, "frozen": "output"}]}


def run(folder: Path, course: Sequence[dict], *words: str, scratch: bool = False) -> Path:
    """A finished run whose records between the first and the measurements are ``course``."""
    path = finished(folder, 0.9, 500, *words, scratch=scratch) / "records.jsonl"
    first, *rest = path.read_text().splitlines()
    middle = [json.dumps({"time": 1.0, **row}) for row in course]
    path.write_text("\n".join([first, *middle, *rest]) + "\n")
    return folder


def plain(shift: float = 0.0) -> list[dict]:
    """Two epochs, an event, two epochs, an event, one epoch."""
    rows = [model(), epoch(0, 0.5 + shift), epoch(0, 0.6 + shift), cut(1, {"1": 45, "3": 27})]
    rows += [epoch(1, 0.7 + shift), epoch(1, 0.72 + shift), cut(2, {"1": 40, "3": 24}), epoch(2, 0.74 + shift)]
    return rows


def told(rows: Sequence[dict]) -> list[Record]:
    return [Record(row["stage"], {k: v for k, v in row.items() if k != "stage"}, 1.0) for row in rows]


class Words(HTMLParser):
    """Collects the text outside of styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self._style = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._style = tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data


def drawn(*paths: Path) -> OverEpochs:
    found = over_epochs(compare(paths))
    assert found is not None
    return found


def points(svg: str, css: str) -> list[tuple[float, float]]:
    found = re.search(rf'<polyline class="arm {css}"[^>]* points="([^"]+)"', svg)
    assert found, css
    return [tuple(map(float, pair.split(","))) for pair in found[1].split()]  # type: ignore[misc]


def test_a_course_counts_epochs_through_all_phases() -> None:
    one = course(told(plain()))
    assert one.epochs == 5
    assert one.events == (2.5, 4.5)
    assert one.validation == ((1, 0.5), (2, 0.6), (2.5, 0.4), (3, 0.7), (4, 0.72), (4.5, 0.4), (5, 0.74))
    assert [x for x, _ in one.train] == [x for x, _ in one.seconds] == [1, 2, 3, 4, 5]
    assert one.widths == {"1": (50, 50, 45, 45, 40, 40), "3": (30, 30, 27, 27, 24, 24)}


def test_a_run_from_scratch_begins_with_its_new_weights() -> None:
    one = course(told(plain()), anew=True)
    assert (one.epochs, one.events, one.train) == (1, (), ((1, 0.74 + 0.02),))
    assert one.widths == {"1": (40, 40), "3": (24, 24)}


def test_an_interrupted_epoch_has_no_time() -> None:
    rows = plain()
    rows.insert(5, {"stage": "resume", "at": 2})  # between the epochs after the first event
    assert [x for x, _ in course(told(rows)).seconds] == [1, 2, 3, 5]


def test_what_is_missing_in_records_is_left_out() -> None:
    rows = [model(), {**epoch(0, 0.5), "train_accuracy": None}, {"stage": "cut", "step": 1}, {"stage": "epoch"}]
    one = course(told(rows))
    assert (one.epochs, one.train, one.validation) == (2, (), ((1, 0.5),))
    assert course(told([])).epochs == 0


def test_steps_hold_within_an_epoch() -> None:
    assert steps([5, 5, 4]) == [(0.5, 5, 0.0), (2.5, 5, 0.0), (2.5, 4, 0.0), (2.5, 4, 0.0)]
    assert steps([]) == []


def test_lines_are_means_over_seeds_with_bands_and_the_test_stands_beside(tmp_path: Path) -> None:
    paths = [run(tmp_path / f"{seed}", plain(seed / 10), f"seed={seed}") for seed in range(2)]
    over = drawn(*paths)
    titles = [title for title, _ in over.figures]
    assert titles == ["Training accuracy", "Validation accuracy, and test at the end", "Time per epoch"]
    validation = over.figures[1][1]
    line = points(validation, "blue")
    assert len(line) == 7
    heights = dict(zip((1, 2, 2.5, 3, 4, 4.5, 5), (y for _, y in line), strict=True))
    per = (heights[1] - heights[3]) / 0.2  # pixels of one
    assert heights[1] - heights[2] == pytest.approx(0.1 * per, abs=0.2)
    assert heights[2.5] - heights[1] == pytest.approx(0.15 * per, abs=0.2)  # both fall to 0.4
    (band,) = re.findall(r'<polygon class="band blue" points="([^"]+)"', validation)
    corners = [tuple(map(float, pair.split(","))) for pair in band.split()]
    assert corners[0][1] == pytest.approx(heights[1] - 0.1 / 2**0.5 * per, abs=0.2)
    assert '<polygon class="test blue"' in validation
    assert '<polygon class="test' not in over.figures[0][1]
    assert "event 1" in validation
    assert over.events


def test_the_same_widths_share_one_line_and_others_do_not(tmp_path: Path) -> None:
    random = run(tmp_path / "random", plain(), "prune.criterion.name=random")
    taylor = run(tmp_path / "taylor", plain())
    fewer = run(
        tmp_path / "fewer", [model(), epoch(0, 0.5), cut(1, {"1": 20}), epoch(1, 0.6)], "prune.budget={units: 0.2}"
    )
    over = drawn(random, taylor, fewer)
    assert [title for title, _ in over.widths] == ["1: 50 units at first", "3: 30 units at first"]
    dashes = re.findall(r'class="arm (\w+)" stroke-dasharray="9 9"', over.widths[0][1])
    assert len(dashes) == 2
    assert "orange" in dashes
    assert over.shared
    assert not over.events  # they differ: rings on the lines
    assert "ring" in over.figures[0][1]
    assert not drawn(taylor).shared


def test_runs_without_an_epoch_or_with_other_numbers_of_epochs(tmp_path: Path) -> None:
    never = run(tmp_path / "never", [model(), cut(1, {"1": 20})])
    assert over_epochs(compare([never])) is None
    assert "Over the epochs" not in render(compare([never]))
    once = run(tmp_path / "once", [model(), epoch(0, 0.5), cut(1, {"1": 20})], "seed=1")
    long = run(tmp_path / "long", plain(), "prune.criterion.name=random")
    for paths in ([once], [never, once], [never, once, long]):
        over = drawn(*paths)
        for _, svg in (*over.figures, *over.widths):
            values = [float(x) for x in re.findall(r'\b(?:c?[xy][12]?)="([^"]+)"', svg)]
            values += [float(x) for path in re.findall(r'points="([^"]*)"', svg) for x in re.split("[ ,]", path)]
            assert values
            assert all(0 <= x <= max(WIDTH, HEIGHT) for x in values)
        assert "Over the epochs" in render(compare(paths))
    alone, joined = drawn(once), drawn(never, once)  # of one arm: what never trained adds nothing
    assert alone.figures[0] == joined.figures[0]
    assert alone.widths == joined.widths
    assert '<circle class="arm blue"' in drawn(once).figures[0][1]  # a single point is seen


def test_roles_beside_each_other(tmp_path: Path) -> None:
    during = "prune.schedule={name: during, total_epochs: 5, initial_iterations: 2, increment: 2, keep: %s}"
    runs = [
        run(tmp_path / "a", plain(), "name=contribution", during % 0.9),
        run(tmp_path / "b", plain(), "name=none", during % 1),
        run(tmp_path / "c", plain(), "name=chance", during % 0.9, "prune.criterion.name=random"),
        run(tmp_path / "d", plain(), "name=new", "prune.schedule={name: iterative, steps: 2}", scratch=True),
    ]
    found = compare(runs)
    assert {arm.label: arm.role for arm in found.arms if arm.role != DENSE} == {
        "none": WHOLE, "contribution": "pruned", "chance": RANDOM, "new": SCRATCH,
    }  # fmt: skip
    over = drawn(*runs)
    assert {label: css for _, css, label in over.legend} == {
        "none": "grey", "contribution": "blue", "chance": "orange", "new": "purple",
    }  # fmt: skip
    page = Words(render(found)).text
    assert "read once, at the end" in " ".join(page.split())


def test_many_groups_are_folded_away_and_many_arms_told_apart(tmp_path: Path) -> None:
    names = {f"block.{place}.conv": 64 for place in range(SHOWN + 3)}
    rows = [model(names), epoch(0, 0.5), cut(1, dict.fromkeys(names, 32)), epoch(1, 0.6)]
    over = drawn(*(run(tmp_path / f"{i}", rows, f"train.lr=0.{i + 1}") for i in range(7)))
    assert (len(over.widths), len(over.more)) == (SHOWN, 3)
    colours = [css for _, css, _ in over.legend]
    assert len(set(colours)) == 7
    assert colours[5:] == ["blue dotted", "green dotted"]

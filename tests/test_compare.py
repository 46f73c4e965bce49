"""Runs beside each other: groups, means over seeds, controls, Pareto fronts, one table and one page."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.compare import compare, records, write
from secateur.recipe import loads
from secateur.report.arms import DENSE, GATED, PRUNED, RANDOM, SCRATCH, Arm, Comparison, front
from secateur.report.compared import render, table
from secateur.report.figures import CHARACTER, WIDTH
from secateur.report.scatter import WIDE, Point, labels, scatter
from secateur.types import CheckpointError, SecateurError
from test_report import Closed

ROOT = Path(__file__).parent.parent


def measured(**values: float) -> list[dict]:
    kinds = {"test top1": "fraction", "validation top1": "fraction", "params": "params", "macs": "macs"}
    return [
        {
            "name": name,
            "value": value,
            "unit": kinds.get(name, "ms"),
            "n": 1,
            "spread": 0.0,
            "device": "cpu",
            "how": "x",
        }
        for name, value in values.items()
    ]


def run(
    folder: Path,
    accuracy: float = 0.9,
    params: float = 500.0,
    *overrides: str,
    latency: float = 1.0,
    scratch: bool = False,
    threads: int = 1,
    finished: bool = True,
    gated: tuple[float, float] | None = None,
    dials: dict[str, list[dict[str, float]]] | None = None,
) -> Path:
    """The folder of a run with these measurements, as ``secateur run`` writes it."""
    recipe = loads("{version: 1, name: tiny}", overrides=list(overrides))
    values = recipe.model_dump(mode="json")
    if scratch:
        values["recover"]["name"] = "scratch"
    rows = [{"stage": "run", "recipe": values, "hash": recipe.hash, "device": "cpu", "threads": threads}]
    if finished:
        quality = {"test top1": accuracy, "validation top1": accuracy - 0.1}
        small = measured(
            **quality, params=params, macs=2 * params, **{"latency batch 1": latency, "latency batch 64": 9.0}
        )
        dense = measured(**{"test top1": 0.95}, params=1000.0, macs=2000.0, **{"latency batch 1": 3.0})
        both = {"dense": dense, "pruned": small}
        if gated is not None:
            both["gated"] = measured(**{"test top1": gated[0]}, params=1100.0, macs=gated[1])
        rows += [{"stage": "measure", "measurements": both, **(dials or {})}, {"stage": "end"}]
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"time": 1.0, **row}) + "\n" for row in rows)
    (folder / "records.jsonl").write_text(text)
    return folder


def named(found: Comparison) -> dict[str, Arm]:
    return {arm.label: arm for arm in found.arms}


def sweep(folder: Path) -> None:
    """Two criteria and the random control over three seeds."""
    for name, shift in (("taylor", 0.0), ("fisher", 0.02), ("random", -0.1)):
        for seed in range(3):
            words = (f"prune.criterion.name={name}", f"seed={seed}")
            run(folder / f"{name}-{seed}", 0.8 + shift + 0.01 * seed**2, 500 + 10 * seed, *words)


def test_runs_of_equal_recipe_up_to_the_seed_are_one_arm(tmp_path: Path) -> None:
    sweep(tmp_path)
    found = compare([tmp_path])
    assert [(arm.role, len(arm.runs)) for arm in found.arms] == [(DENSE, 9), (PRUNED, 3), (PRUNED, 3), (RANDOM, 3)]
    arm = named(found)["criterion.name=taylor"]
    accuracy, params = [0.8, 0.81, 0.84], [500, 510, 520]
    for name, values in (("test top1", accuracy), ("params", params)):
        assert arm.values[name].mean == pytest.approx(np.mean(values))
        assert arm.values[name].spread == pytest.approx(np.std(values, ddof=1))
        assert arm.values[name].n == 3
    assert named(found)["dense"].values["params"].n == 3  # nine runs, three seeds


def test_labels_name_only_what_differs(tmp_path: Path) -> None:
    paths = [
        run(tmp_path / "a", 0.9, 500, "prune.budget={units: 0.5}", "out=x"),
        run(tmp_path / "b", 0.9, 500, "prune.budget={macs: 0.25}", "out=y"),
    ]
    assert list(named(compare(paths))) == ["dense", "budget.units=0.5", "budget.macs=0.25"]
    paths.append(run(tmp_path / "c", 0.9, 500, "prune.budget={macs: 0.25}", "name=other", "train.lr=0.5"))
    assert list(named(compare(paths))) == [
        "dense tiny",
        "dense other",
        "tiny, budget.units=0.5, train.lr=0.001",
        "tiny, budget.macs=0.25, train.lr=0.001",
        "other, budget.macs=0.25, train.lr=0.5",
    ]
    assert [arm.label for arm in compare(paths[:1]).arms] == ["dense", "tiny"]
    assert list(named(compare([paths[1], paths[2]]))) == ["dense tiny", "dense other", "tiny", "other"]  # names do


def test_runs_of_one_seed_count_once(tmp_path: Path) -> None:
    paths = [run(tmp_path / f"{i}", accuracy, 500, f"seed={i // 2}") for i, accuracy in enumerate((0.5, 0.7, 0.8, 0.8))]
    found = compare([*paths, paths[0], paths[0] / "records.jsonl"])
    value = found.arms[1].values["test top1"]
    assert (value.n, value.mean) == (2, pytest.approx(0.7))
    assert value.spread == pytest.approx(statistics.stdev([0.6, 0.8]))
    assert any("tiny (4 runs)" in note for note in found.notes)


def test_the_seed_of_a_criterion_is_a_seed(tmp_path: Path) -> None:
    words = "prune.criterion.name=random"
    drawn = [run(tmp_path / f"{i}", 0.5 + i / 10, 500, words, f"prune.criterion.args={{seed: {i}}}") for i in range(3)]
    assert compare(drawn).arms[1].values["test top1"].n == 3
    same = [run(tmp_path / f"s{i}", 0.5, 500, words, "prune.criterion.args={seed: 7}", f"seed={i}") for i in range(2)]
    assert any("one seed of its own" in note for note in compare(same).notes)
    free = [run(tmp_path / f"f{i}", 0.5, 500, words, f"seed={i}") for i in range(2)]
    assert not any("one seed of its own" in note for note in compare(free).notes)


def test_controls_stand_beside_and_gains_are_paired_by_seed(tmp_path: Path) -> None:
    for budget in (0.25, 0.5):
        for seed in range(2):
            words = (f"prune.budget={{units: {budget}}}", f"seed={seed}")
            where = tmp_path / f"{budget}-{seed}"
            run(where / "taylor", 0.8 + seed / 10 + budget / 10, 500, *words)
            run(where / "random", 0.7 + seed / 20, 500, *words, "prune.criterion.name=random")
            run(where / "scratch", 0.6, 500, *words, scratch=True)
    found = compare(sorted(tmp_path.iterdir()))
    roles = [arm.role for arm in found.arms]
    assert roles == [DENSE, PRUNED, RANDOM, SCRATCH, PRUNED, RANDOM, SCRATCH]
    gain = named(found)["budget.units=0.25, criterion.name=taylor, recover.name=finetune"].gains
    expected = [0.825 - 0.7, 0.925 - 0.75]
    assert gain[RANDOM].mean == pytest.approx(statistics.fmean(expected))
    assert gain[RANDOM].spread == pytest.approx(statistics.stdev(expected))
    assert gain[SCRATCH].mean == pytest.approx(0.275)
    assert all(not arm.gains for arm in found.arms if arm.role != PRUNED)
    assert not any("No " in note for note in found.notes)
    text = table(found)
    for part in ("+15.00 ± 3.54", "over random", "from scratch"):
        assert part in re.sub(r"\s+", " ", text), part


def test_absent_controls_are_said(tmp_path: Path) -> None:
    taylor = run(tmp_path / "taylor")
    notes = compare([taylor]).notes
    for kind in (RANDOM, SCRATCH):
        assert any(note.startswith(f"No {kind} run is among these") for note in notes)
        assert f"No {kind} run is among these" in render(compare([taylor]))
        assert f"No {kind} run is among these" in table(compare([taylor]))
    random = run(tmp_path / "random", 0.5, 500, "prune.criterion.name=random")
    other = run(tmp_path / "other", 0.9, 500, "prune.budget={units: 0.3}")
    notes = compare([taylor, random, other]).notes
    (note,) = (note for note in notes if "random control" in note)
    assert note.endswith("for: budget.units=0.3, criterion.name=taylor.")
    unpaired = compare([run(tmp_path / "late", 0.9, 500, "seed=7"), random])
    assert any("of equal recipe and seed" in note for note in unpaired.notes)


def test_gated_runs_stand_with_their_own_figures_beside_static_ones(tmp_path: Path) -> None:
    words = ("prune.budget={units: 1}", "prune.schedule={name: once}")
    steps = {0.7: (0.94, 1400.0), 0.5: (0.92, 700.0)}
    paths = [run(tmp_path / "static", 0.9, 500, "prune.budget={units: 0.5}", words[1])]
    for density, values in steps.items():
        for seed in range(2):
            own = (*words, f"fbs.densities=[1.0, {density}]", f"seed={seed}")
            paths.append(
                run(tmp_path / f"{density}-{seed}", 0.95, 1000, *own, gated=(values[0] + seed / 100, values[1]))
            )
    found = compare(paths)
    assert [arm.role for arm in found.arms] == [DENSE, PRUNED, GATED, GATED]  # one dense model for all
    assert [arm.label for arm in found.arms[1:]] == [
        "budget.units=0.5",
        "fbs.densities=[1.0, 0.7], budget.units=1.0",
        "fbs.densities=[1.0, 0.5], budget.units=1.0",
    ]
    for arm, (accuracy, macs) in zip(found.arms[2:], steps.values(), strict=True):
        assert arm.values["test top1"].mean == pytest.approx(accuracy + 0.005)
        assert (arm.values["macs"].mean, arm.values["params"].mean) == (macs, 1100.0)
        assert "latency batch 1" not in arm.values
        assert arm.gains == {}
    assert found.fronts["macs"] == (3, 2, 0)  # the static run costs more than the better gated one
    assert found.fronts["latency batch 1"] == (1, 0)
    assert any(note.startswith("MACs of gated rows") for note in found.notes)
    assert not any("gated" in note for note in compare(paths[:1]).notes)
    page, text = render(found), table(found)
    figure = page[page.index("against MACs") :].partition("</svg>")[0]
    assert figure.count('<circle class="gated"') == 2 + 1  # and the legend
    assert len(re.findall(r"│ gated +│", text)) == 2


def test_a_gated_run_stands_once_for_each_density_or_budget(tmp_path: Path) -> None:
    def row(key: str, at: float, macs: float) -> dict[str, float]:
        return {key: at, "macs": macs, "top1": 0.5 + at / 2, "loss": 1.0, "n": 100}

    whole = ("prune.budget={units: 1}", "prune.schedule={name: once}")
    paths = []
    for seed in range(2):
        own = (*whole, f"seed={seed}", "fbs.densities=[0.7, 0.5]")
        two = {"densities": [row("density", 0.7, 1400.0), row("density", 0.5, 700.0)]}
        paths.append(run(tmp_path / f"fbs-{seed}", 0.9, 1000, *own, gated=(0.75, 700.0), dials=two))
    for penalty in (-0.1, -0.2):
        own = (*whole, f"rnp.penalty={penalty}", f"rnp.budgets=[{-penalty}]")
        one = {"budgets": [row("budget", -penalty, -900.0 * penalty)]}
        paths.append(run(tmp_path / f"rnp-{penalty}", 0.9, 1000, *own, gated=(0.8, 1000.0), dials=one))
    found = compare(paths)
    assert {arm.label: (arm.values["macs"].mean, arm.values["test top1"].n) for arm in found.arms[1:]} == {
        "fbs.density=0.5": (700.0, 2),
        "fbs.density=0.7": (1400.0, 2),
        "rnp.penalty=-0.1": (1000.0, 1),
        "rnp.budget=0.1, rnp.penalty=-0.1": (90.0, 1),
        "rnp.penalty=-0.2": (1000.0, 1),
        "rnp.budget=0.2, rnp.penalty=-0.2": (180.0, 1),
    }
    high = named(found)["fbs.density=0.7"].values
    assert (high["test top1"].mean, high["params"].mean) == (0.85, 1100.0)
    assert "latency batch 1" not in high  # it was measured at the last density
    assert [arm.role for arm in found.arms] == [DENSE, *[GATED] * 6]
    assert len(found.arms[0].runs) == len(found.outcomes) == 4  # a run, not a point
    assert render(found).count("fbs.density=0.7") >= 1
    assert not any("Several runs of one seed" in note for note in found.notes)


def test_runs_that_need_no_control_are_not_said_to_lack_one(tmp_path: Path) -> None:
    own = ("prune.budget={units: 1}", "prune.schedule={name: once}", "fbs.densities=[0.5]")
    notes = compare([run(tmp_path / "gated", 0.9, 500, *own, gated=(0.9, 700.0))]).notes
    assert not any("control" in note or "from scratch" in note for note in notes)


def test_what_does_not_compare_is_said(tmp_path: Path) -> None:
    one, two = run(tmp_path / "a"), run(tmp_path / "b", 0.9, 500, "seed=1", "data.name=mnist", threads=2)
    notes = compare([one, two]).notes
    assert any("cpu, 1 thread; cpu, 2 threads" in note for note in notes)
    assert any("(digits, mnist)" in note for note in notes)
    assert any(note.startswith("One seed only") for note in notes)
    assert compare([one], notes=["beware"]).notes[0] == "beware"


def test_unfinished_runs_are_left_out_and_foreign_folders_refused(tmp_path: Path) -> None:
    done, open_ = run(tmp_path / "done"), run(tmp_path / "open", finished=False)
    found = compare([done, open_])
    assert len(found.outcomes) == 1
    assert any("left out" in note and "open" in note for note in found.notes)
    with pytest.raises(SecateurError, match="1 unfinished"):
        compare([open_])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="folder of a run"):
        compare([done, tmp_path / "empty"])
    assert records(tmp_path) == [(tmp_path / name / "records.jsonl").resolve() for name in ("done", "open")]


def test_a_record_file_alone_is_enough() -> None:
    found = compare([ROOT / "docs" / "results" / "quickstart.jsonl"])
    assert named(found)["quickstart"].values["params"].mean == 2630
    assert found.costs == ("params", "macs", "latency batch 1", "latency batch 64")


def test_the_front_is_what_no_point_beats() -> None:
    source = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(a), float(b)) for a, b in source.integers(0, 6, (12, 2))]
        beaten = [
            any(a >= accuracy and c <= cost and (a, c) != (accuracy, cost) for a, c in points)
            for accuracy, cost in points
        ]
        best = front([*points, None])
        assert set(best) == {number for number, lost in enumerate(beaten) if not lost}
        assert [points[i][1] for i in best] == sorted(points[i][1] for i in best)


def test_fronts_are_marked(tmp_path: Path) -> None:
    sweep(tmp_path)
    found = compare([tmp_path])
    places = {found.arms[i].label for i in found.fronts["params"]}
    assert places == {"dense", "criterion.name=fisher"}
    by = compare([tmp_path], part="validation")
    assert by.accuracy == "validation top1"
    assert named(by)["criterion.name=taylor"].values[by.accuracy].mean == pytest.approx(0.8 + 0.05 / 3 - 0.1)


def test_the_page_is_whole_alone_and_escaped(tmp_path: Path) -> None:
    sweep(tmp_path)
    page = render(compare([tmp_path], notes=["<b>bold</b>"]))
    parser = Closed()
    parser.feed(page)
    assert parser.open == []
    assert parser.links == []
    assert "http" not in page
    assert "<b>bold" not in page
    assert page.count("<svg") == 4
    assert page.count("polyline") - page.count("svg polyline") == 4
    for text in ("81.67 ± 2.08 %", "510 ± 10", "random control", "9 runs compared", "+10.00 ± 0.00"):
        assert text in re.sub("<[^>]+>", "", page), text
    write(compare([tmp_path]), tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")


def circles(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r'<circle class="p" cx="([\d.]+)" cy="([\d.]+)" r="4.2"><title>', svg)
    return [(float(x), float(y)) for x, y in found]


def test_points_and_bars_stand_where_the_values_are() -> None:
    points = [
        Point(100, 0.5, 20, 0.1, 1, "p", "a"),
        Point(300, 0.9, 0, 0, 2, "p", "b"),
        Point(200, 0.7, 0, 0, 3, "p", "c"),
    ]
    svg = scatter("t", "cost", points, [(100, 0.5), (300, 0.9)], {"p": "some"})
    (x1, y1), (x2, y2), (x3, y3) = circles(svg)
    assert (x3, y3) == (pytest.approx((x1 + x2) / 2, abs=0.1), pytest.approx((y1 + y2) / 2, abs=0.1))
    wide, tall = (x2 - x1) / 200, (y1 - y2) / 0.4
    lines = [
        tuple(map(float, row)) for row in re.findall(r'x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"/>', svg)
    ]
    assert len(lines) == 6
    assert lines[0] == pytest.approx((x1 - 20 * wide, y1, x1 + 20 * wide, y1), abs=0.2)
    assert lines[3] == pytest.approx((x1, y1 - 0.1 * tall, x1, y1 + 0.1 * tall), abs=0.2)
    stairs = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()]  # type: ignore[index]
    assert stairs[:3] == [(x1, y1), (x2, y1), (x2, y2)]


def test_wide_ranges_are_logarithmic() -> None:
    points = [Point(10.0**k, 0.5, 0, 0, k, "p", "a") for k in range(3)]
    svg = scatter("t", "cost", points, [], {})
    xs = [x for x, _ in circles(svg)]
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2, abs=0.1)
    assert "cost, logarithmic" in svg
    assert "logarithmic" not in scatter("t", "cost", [Point(x, 0.5, 0, 0, 1, "p", "a") for x in (1, WIDE)], [], {})


def test_the_legend_stays_in_the_figure() -> None:
    names = dict.fromkeys("abcde", "from scratch, say") | {"front": "Pareto front"}
    svg = scatter("t", "cost", [Point(1, 0.5, 0, 0, 1, "a", "x")], [], names)
    words = re.findall(r'<text x="(\d+)" y="(\d+)">([^<]+)</text>', svg)
    assert len(words) == 6
    assert {y for _, y, _ in words} == {"13", "28"}
    assert all(int(x) + CHARACTER * len(text) <= WIDTH for x, _, text in words)


def test_extreme_points_give_a_figure() -> None:
    assert scatter("t", "cost", [], [], {}) == ""
    for points in (
        [Point(5, 1.0, 0, 0, 1, "p", "one")],
        [Point(0, 0.0, 0, 0, 1, "p", "zero"), Point(1e12, 1.0, 1e13, 2.0, 2, "p", "huge")],
        [Point(1e-9, 0.5, 1e-8, 0.0, 1, "p", "tiny"), Point(1, 0.5, 2, 0, 2, "p", "flat")],
    ):
        svg = scatter("t", "cost", points, [(p.x, p.y) for p in points], {"p": "some"})
        numbers = [float(x) for x in re.findall(r'\b(?:c?[xy][12]?)="([^"]+)"', svg)]
        assert numbers
        assert all(math.isfinite(x) for x in numbers)


def test_numbers_do_not_cover_each_other() -> None:
    found = labels([(100.0, 100.0 + k) for k in range(5)], ["10"] * 5)
    boxes = [(x - 6, y - 9, x + 6, y + 1) for x, y in found]
    for i, one in enumerate(boxes):
        for two in boxes[:i]:
            assert min(one[2], two[2]) <= max(one[0], two[0]) or min(one[3], two[3]) <= max(one[1], two[1])


def test_the_command(tmp_path: Path) -> None:
    sweep(tmp_path / "runs")
    words = ["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "82.67" not in done.stdout
    for text in ("81.67 ± 2.08 %", "Pareto front", "No from scratch run", str(tmp_path / "page.html")):
        assert text in done.stdout, text
    assert "9 runs compared" in (tmp_path / "page.html").read_text()
    assert "71.67" in CliRunner().invoke(app, [*words, "--part", "validation"]).stdout
    assert CliRunner().invoke(app, [*words, "--part", "train"]).exit_code == 2
    failed = CliRunner().invoke(app, ["compare", str(tmp_path / "nowhere")])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: ")

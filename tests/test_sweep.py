"""Grids: cells, parallel runs, failures that stay alone, and sweeps that go on where they stopped."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import secateur as sc
from secateur import launch, pipeline
from secateur.cli import app
from secateur.grid import Cell, cells, folder_name, parse_arms, parse_grid
from secateur.launch import End, Here, threads
from secateur.recipe import load, loads
from secateur.session import Screen
from secateur.sweep import Losses, sweep
from secateur.types import RecipeError, SecateurError

TINY = """
version: 1
name: tiny
device: cpu
data: {limit: 200}
train: {epochs: 1, lr: 0.003}
prune: {criterion: {samples: 64}}
recover: {epochs: 1}
measure: {repeats: 1, batch_sizes: [1]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_grids_are_split_at_commas_outside_brackets_and_quotes() -> None:
    grid = parse_grid(["prune.budget={macs: 0.5, units: null},{params: 0.5}", "a = 'x,y', z", 'b="[",1'])
    assert grid == {
        "prune.budget": ("{macs: 0.5, units: null}", "{params: 0.5}"),
        "a": ("'x,y'", "z"),
        "b": ('"["', "1"),
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["seed"], "must be key=value"),
        (["=1"], "must be key=value"),
        (["seed=1,,2"], "must be key=value"),
        (["seed=1", "seed=2"], "given twice"),
        (["seed=1,1"], "there twice"),
        (["out=a,b"], "made by the sweep"),
    ],
)
def test_wrong_grids_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_grid(texts)


def test_a_sweep_needs_a_grid_or_arms(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least one --grid"):
        cells(recipe, [], tmp_path / "out")


def test_arms_of_several_values_go_with_every_point(recipe: Path, tmp_path: Path) -> None:
    arms = [
        "name=none  prune.budget={units: 1}",
        "name=worst prune.criterion.worst=true",
        "prune.criterion={name: random}",
    ]
    found = cells(recipe, ["seed=0,1"], tmp_path / "out", ["train.lr=0.5"], arms)
    assert [(c.recipe.name, c.recipe.seed) for c in found] == [
        (name, seed) for name in ("none", "worst", "tiny") for seed in (0, 1)
    ]
    assert [c.recipe.prune.budget.units for c in found] == [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert [c.recipe.prune.criterion.worst for c in found] == [False, False, True, True, False, False]
    assert found[4].recipe.prune.criterion.name == "random"
    assert len({c.folder for c in found}) == 6
    assert len(cells(recipe, [], tmp_path / "out", (), arms)) == 3


@pytest.mark.parametrize("texts", [[""], ["worst"], ["name=a", "name=a"], ["name=a prune.freeze"]])
def test_wrong_arms_are_refused(texts: list[str]) -> None:
    with pytest.raises(RecipeError, match="--arm"):
        parse_arms(texts)


def test_cells_are_the_product_with_safe_names(recipe: Path, tmp_path: Path) -> None:
    grid = ["prune.criterion.name=taylor,fisher", "seed=0,1,2", "prune.freeze=[],['0/../x']"]
    found = cells(recipe, grid, tmp_path / "out", ["train.lr=0.5"])
    assert len({cell.name for cell in found}) == len(found) == 12
    assert {(c.recipe.prune.criterion.name, c.recipe.seed, c.recipe.prune.freeze) for c in found} == {
        (name, seed, freeze) for name in ("taylor", "fisher") for seed in range(3) for freeze in ((), ("0/../x",))
    }
    for cell in found:
        assert cell.recipe.train.lr == 0.5
        assert cell.folder.parent == tmp_path / "out"
        assert "/" not in cell.name
    assert folder_name(["a.b=x/y"]) != folder_name(["a.b=x:y"])
    assert len(folder_name(["a.b=" + "x" * 500])) < 200
    assert not (tmp_path / "out").exists()


def test_every_cell_is_checked_before_the_first_starts(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'taylor'"):
        sweep(recipe, ["prune.criterion.name=fisher,tailor"], tmp_path / "out")
    with pytest.raises(RecipeError, match="the same recipe"):
        sweep(recipe, ["train.lr=0.1,0.10"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other = pipeline_folder(tmp_path / "out" / "seed=1")
    with pytest.raises(RecipeError, match=r"train\.lr"):
        sweep(recipe, ["seed=0,1"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [other.name]


def pipeline_folder(folder: Path) -> Path:
    """A folder of another recipe."""
    from secateur.folder import write_recipe

    folder.mkdir(parents=True)
    write_recipe(loads(TINY, overrides=["train.lr=0.9", "seed=1"]), folder)
    return folder


def same_weights(one: Path, two: Path) -> bool:
    a, b = (sc.load(path / "pruned.safetensors").state_dict() for path in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_failed_cell_is_listed_and_the_others_are_kept_skipped_and_compared(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = [
        "sweep",
        str(recipe),
        "threads=1",
        "--grid",
        "prune.freeze=[],[layer9],['2']",
        "--jobs",
        "2",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "1 of 3 cells failed" in done.stderr
    assert "matches no group" in done.stderr
    assert "freeze=_layer9_" in done.stderr
    assert done.stderr.count("exit code") == 1
    assert "over random" not in done.stdout
    assert "2 runs compared" in (out / "compare.html").read_text()
    (folder,) = (cell.folder for cell in cells(recipe, ["prune.freeze=['2']"], out, ["threads=1"]))
    recipe_there = load(folder / "recipe.yaml", [f"out={json.dumps(str(tmp_path / 'alone'))}"])
    assert same_weights(folder, pipeline.run(recipe_there))

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    started: list[Cell] = []
    monkeypatch.setattr(Here, "start", lambda self, cell, log: started.append(cell) or no_process())
    lines: list[str] = []
    result = sweep(
        recipe, ["prune.freeze=[],[layer9],['2']"], out, overrides=["threads=1"], screen=Screen(lines.append)
    )
    assert [cell.recipe.prune.freeze for cell in started] == [("layer9",)]  # tried again, the others skipped
    assert len(result.done) == 2
    assert "could not be started" in result.failed[0][1]
    assert "2 of 3 cells are complete" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def no_process() -> None:
    raise OSError("no process left")


def test_an_interrupted_sweep_goes_on_to_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["threads=1", "train.epochs=30"]
    words = [sys.executable, "-m", "secateur", "sweep", str(recipe), *options, "--grid", "seed=5", "--out", str(out)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not (out / "seed=5" / "state.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(SecateurError, match="another sweep"):
            sweep(recipe, ["seed=5"], out, overrides=options)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=120)
    assert process.returncode == 143
    assert message.startswith("error: interrupted. Finished cells are kept")
    assert not (out / "seed=5" / "pruned.safetensors").exists()
    result = sweep(recipe, ["seed=5"], out, overrides=options)  # the lock is free: no run was left behind
    assert not result.failed
    assert '"stage": "resume"' in (out / "seed=5" / "records.jsonl").read_text()
    whole = pipeline.run(load(recipe, [*options, "seed=5", f"out={json.dumps(str(tmp_path / 'whole'))}"]))
    assert same_weights(out / "seed=5", whole)


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a short program stand for the run of a cell; ``folder`` is its folder."""
    start = "import os, sys, time, pathlib; folder = pathlib.Path(sys.argv[1])\n"
    monkeypatch.setattr(launch, "command", lambda cell: [sys.executable, "-S", "-c", start + code, str(cell.folder)])


def test_jobs_run_at_once_and_share_the_threads(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch,
        "begin = time.time(); time.sleep(1.0)\n"
        "(folder / 'seen').write_text(f\"{begin} {time.time()} {os.environ['OMP_NUM_THREADS']}\")",
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [threads(jobs) for jobs in (1, 2, 3, 20)] == [8, 4, 2, 1]
    sweep(recipe, ["seed=0,1,2,3"], tmp_path / "out", jobs=2)
    rows = [(tmp_path / "out" / f"seed={seed}" / "seen").read_text().split() for seed in range(4)]
    assert {row[2] for row in rows} == {"4"}
    spans = [(float(begin), float(end)) for begin, end, _ in rows]
    together = [sum(begin <= at < end for begin, end in spans) for at, _ in spans]
    assert max(together) == 2


def test_a_killed_or_silent_run_is_a_failure(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "os.kill(os.getpid(), 9) if folder.name == 'seed=0' else None")
    result = sweep(recipe, ["seed=0,1"], tmp_path / "out")
    assert result.comparison is None
    assert [(cell.name, why.split(";")[0]) for cell, why in result.failed] == [
        ("seed=0", "killed by SIGKILL"),
        ("seed=1", "it said nothing (exit code 0"),
    ]


def test_the_lock_outlives_a_killed_sweep(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs inherits the lock; so does the program that stands for a run here."""
    stand_in(monkeypatch, "time.sleep(1.5)")
    out = tmp_path / "out"
    out.mkdir()
    (cell,) = cells(recipe, ["seed=0"], out)
    cell.folder.mkdir()
    with open(out / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        worker = Here(1, file).start(cell, tmp_path / "log")
    with pytest.raises(SecateurError, match="left behind"):
        sweep(recipe, ["seed=0"], out)
    worker.process.wait()
    assert sweep(recipe, ["seed=0"], out).failed


def test_mistakes_at_the_command_line(recipe: Path, tmp_path: Path) -> None:
    for words, part in (
        (["--grid", "seed=0,x"], "seed = 'x'"),
        (["--grid", "train.lrr=1"], "did you mean 'lr'"),
    ):
        done = CliRunner().invoke(app, ["sweep", str(recipe), *words, "--out", str(tmp_path / "out")])
        assert done.exit_code == 1, done.output
        assert done.stderr.startswith("error: ")
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_lost_run_is_tried_again_while_it_gets_on(recipe: Path, tmp_path: Path) -> None:
    (cell,) = cells(recipe, ["seed=0"], tmp_path / "out")
    cell.folder.mkdir(parents=True)
    losses, lost = Losses(), End("its worker was lost", lost=True)
    assert not losses.again(cell, End("wrong"))
    assert [losses.again(cell, lost) for _ in range(3)] == [True, True, False]
    losses = Losses()
    for size in range(1, 9):  # a record more each time
        (cell.folder / "records.jsonl").write_text("x" * size)
        assert losses.again(cell, lost)
    assert losses.again(cell, lost)
    assert not losses.again(cell, lost)

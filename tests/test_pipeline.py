"""The main job: a run from recipe to report, interrupted and resumed, and its promises."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur import pipeline, resolve
from secateur.folder import choose
from secateur.pipeline import plan_stages
from secateur.progressive import compose, relative, whole, widths
from secateur.recipe import Recipe, loads
from secateur.report.view import view
from secateur.session import Screen, traced
from secateur.track.local import Log, read
from secateur.types import Budget, Plan, PlanError, RecipeError, VerificationError

TINY = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 200}
train: {epochs: 2, lr: 0.003, rate: cosine}
prune: {criterion: {samples: 100}, budget: {units: 0.43}, schedule: {steps: 2}}
recover: {epochs: 1, final_epochs: 2}
measure: {repeats: 1, batch_sizes: [1, 8]}
"""


def tiny(folder: Path, *overrides: str) -> Recipe:
    return loads(TINY, overrides=[f"out={json.dumps(str(folder))}", *overrides])


def figures(folder: Path) -> list[dict]:
    """The records without their times."""
    return [
        {"stage": r.stage, **{k: v for k, v in r.data.items() if k not in ("seconds", "resumed", "recipe")}}
        for r in read(folder / "records.jsonl")
        if r.stage not in ("measure", "model", "resume")
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(tiny(tmp_path_factory.mktemp("run") / "out"))


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs that were never interrupted, by the name of their options."""
    return functools.cache(lambda name: pipeline.run(tiny(tmp_path_factory.mktemp("whole") / "out", *options(name))))


def test_the_folder_holds_what_is_promised(finished: Path) -> None:
    found = {path.name for path in finished.iterdir()}
    assert found == {
        "recipe.yaml", "records.jsonl", "plan.json", "plans", "proof.json", "dense.safetensors",
        "pruned.safetensors", "model_summary.txt", "pruned_model_summary.txt", "report.html",
    }  # fmt: skip


def test_the_widths_meet_the_budget_and_the_files_agree(finished: Path) -> None:
    plan = Plan.from_json((finished / "plan.json").read_text())
    assert dict(plan.achieved)["units"] == pytest.approx(6 / 14)
    small, dense = sc.load(finished / "pruned.safetensors"), sc.load(finished / "dense.safetensors")
    kept = {name: len(indices) for name, _, indices in plan.keep}
    assert [small[i].out_channels for i in (0, 2, 4)] == [kept.get(str(i), dense[i].out_channels) for i in (0, 2, 4)]
    assert json.loads((finished / "proof.json").read_text())["ok"] is True
    counted = sum(p.numel() for p in small.parameters())
    assert f"{counted:,}" in (finished / "pruned_model_summary.txt").read_text()


def test_every_epoch_of_both_phases_has_loss_and_accuracy(finished: Path) -> None:
    epochs = [r.data for r in read(finished / "records.jsonl") if r.stage == "epoch"]
    assert [(row["step"], row["epoch"]) for row in epochs] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    for row in epochs:
        assert row["train_loss"] > 0
        assert row["validation_loss"] > 0
        assert 0 <= row["train_accuracy"] <= 1
        assert 0 <= row["validation_accuracy"] <= 1


def test_cuts_record_accuracy_right_after_pruning(finished: Path) -> None:
    cuts = [r.data for r in read(finished / "records.jsonl") if r.stage == "cut"]
    assert [cut["achieved"]["units"] for cut in cuts] == pytest.approx([10 / 14, 6 / 14])
    assert all(cut["after"]["n"] == cut["before"]["n"] > 0 for cut in cuts)


def test_the_last_figures_are_those_of_the_saved_model(finished: Path) -> None:
    from secateur.infer import evaluate, open_model

    measured = next(r.data for r in read(finished / "records.jsonl") if r.stage == "measure")["measurements"]
    for name in ("dense", "pruned"):
        quality, _ = evaluate(open_model(finished / f"{name}.safetensors"))
        found = {m["name"]: m["value"] for m in measured[name]}
        assert found["test top1"] == pytest.approx(quality.top1)
        assert found["test loss"] == pytest.approx(quality.loss, rel=1e-5)


class Stop(KeyboardInterrupt):
    """Stands for Ctrl-C, SIGTERM or a kill at a chosen moment."""


def stopped_and_resumed(recipe: Recipe, at: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run until record ``at`` is about to be written, then resume; return the folder."""
    append, count = Log.append, 0

    def stopping(self: Log, stage: str, **data: object) -> object:
        nonlocal count
        if stage in ("epoch", "cut"):
            count += 1
            if count == at:
                raise Stop  # after the work of the epoch or cut, before any of it is on the disk
        return append(self, stage, **data)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", stopping)
        with pytest.raises(Stop):
            pipeline.run(recipe)
    assert recipe.out is not None
    assert not (Path(recipe.out) / "pruned.safetensors").exists()
    return pipeline.run(recipe, resume=True)


def assert_same_run(one: Path, two: Path) -> None:
    """Assert that two runs ended in the same files, bit for bit, and recorded the same figures."""
    for name in ("dense.safetensors", "pruned.safetensors", "plan.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert figures(one)[1:] == figures(two)[1:]


@pytest.mark.parametrize("at", [1, 3, 4, 6, 7])
def test_a_run_stopped_anywhere_ends_in_the_same_bits(
    at: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_run(finished, stopped_and_resumed(tiny(tmp_path / "out"), at, monkeypatch))


def options(name: str) -> list[str]:
    return {
        "average and blends": ["train.ema=0.9", "train.mixup=0.3", "train.warmup=1", "train.optimizer=rmsprop"],
        "distil": ["recover.name=distil", "recover.distil={features: 10.0}", "train.mixup=0.2"],
        "rewind": ["recover={name: rewind, rewind: 1}", "train.epochs=3"],
        "rewind to the beginning": ["recover={name: rewind, rewind: 0}"],
        "scratch": ["recover={name: scratch, epochs: 1, final_epochs: 2}"],
        "carried": ["recover.carry_optimizer=true", "recover.lr=0.001"],
        "recalibrated": ["model={name: small_cnn}", "recover.recalibrate=3", "recover.epochs=1"],
        "every": ["prune.schedule={name: every, units: 3}", "prune.round_to=null", "recover.steps=9"],
        "bfloat16": ["train.precision=bfloat16", "train.channels_last=false"],
        "evidence": ["prune.criterion={name: fisher, evidence: training}", "recover.steps=9"],
    }[name]


@pytest.mark.parametrize("at", [2, 4, 7])
@pytest.mark.parametrize(
    "name",
    [
        "average and blends",
        "bfloat16",
        "carried",
        "distil",
        "evidence",
        "every",
        "recalibrated",
        "rewind",
        "rewind to the beginning",
        "scratch",
    ],
)
def test_every_way_to_train_ends_in_the_same_bits_when_stopped(
    name: str, at: int, whole_runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = stopped_and_resumed(tiny(tmp_path / "out", *options(name)), at, monkeypatch)
    assert_same_run(whole_runs(name), resumed)


def test_a_stop_within_an_epoch_resumes_at_the_step(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur import watching
    from secateur.train import loop

    monkeypatch.setattr(watching, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(loop, "CHECK_EVERY", 3)
    seen: list[int] = []

    def progress(label: str, done: int, total: int) -> None:
        seen.append(done)
        if done == 13:  # epoch 2, step 6 of 7; the last saved state is that of step 3
            raise Stop

    with pytest.raises(Stop):
        pipeline.run(tiny(tmp_path / "out"), screen=Screen(progress=progress))
    seen.clear()
    pipeline.run(tiny(tmp_path / "out"), resume=True, screen=Screen(progress=lambda *a: seen.append(a[1])))
    assert seen[0] > 7
    one, two = (sc.load(f / "pruned.safetensors").state_dict() for f in (finished, tmp_path / "out"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_resume_of_a_complete_run_changes_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    recipe = loads(TINY, overrides=[f"out={json.dumps(str(finished))}"])
    assert pipeline.run(recipe, resume=True) == finished
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_resume_refuses_another_recipe_and_names_the_keys(finished: Path) -> None:
    recipe = loads(TINY, overrides=[f"out={json.dumps(str(finished))}", "train.lr=0.5"])
    with pytest.raises(RecipeError, match=r"train\.lr: 0\.003 there, 0\.5 here"):
        pipeline.run(recipe, resume=True)


def test_a_taken_folder_and_a_missing_run_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not empty"):
        pipeline.run(loads(TINY, overrides=[f"out={json.dumps(str(finished))}"]))
    with pytest.raises(RecipeError, match="no run to resume"):
        pipeline.run(tiny(tmp_path / "nothing"), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(RecipeError, match="no run to resume"):
        pipeline.run(tiny(tmp_path / "other"), resume=True)


def test_a_run_killed_before_its_first_file_begins_anew(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".recipe.yaml.1.tmp").write_text("version")
    assert choose(tiny(folder), resume=True) == folder


def test_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = loads(TINY)
    found = []
    for _ in range(3):
        found.append(str(choose(recipe, resume=False)))
        Path(found[-1]).mkdir(parents=True)
    assert found == ["runs/tiny", "runs/tiny-2", "runs/tiny-3"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.budget={params: 0.001}", "params"),
        ("prune.freeze=[nothing_like_this]", "matches no group"),
        ("model.args={classes: 7}", "7 scores per image"),
        ("data={name: mnist, root: /no/such/folder}", "not a folder"),
        ("device=cuda:99", "CUDA devices"),
    ],
)
def test_what_cannot_work_fails_before_anything_is_written(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        pipeline.run(tiny(tmp_path / "out", override))
    assert list(tmp_path.iterdir()) == []


def test_keep_and_freeze_hold_over_all_cuts(tmp_path: Path) -> None:
    folder = pipeline.run(
        tiny(tmp_path / "out", "prune.keep={'4': 0.75}", "prune.freeze=['2']", "prune.budget={units: 0.79}")
    )
    small = sc.load(folder / "pruned.safetensors")
    assert (small[2].out_channels, small[4].out_channels) == (4, 6)


@pytest.mark.parametrize("kind", ["units", "params", "macs"])
def test_budgets_of_every_kind_are_met_over_several_cuts(kind: str, tmp_path: Path) -> None:
    net = ["model={name: mlp, args: {widths: [40, 30]}}", "prune.round_to=null"]
    folder = pipeline.run(tiny(tmp_path / "out", f"prune.budget={{{kind}: 0.5}}", *net))
    assert dict(Plan.from_json((folder / "plan.json").read_text()).achieved)[kind] == pytest.approx(0.5, abs=0.02)


def test_plans_of_several_cuts_compose_to_one_of_the_dense_model() -> None:
    data = resolve.dataset(loads(TINY).data, 0)
    dense = traced(resolve.model(loads(TINY), data), data)
    budget = Budget(units=0.5)
    first = Plan("other", (("4", 8, (0, 2, 4, 6, 7)),))
    done = compose(dense, whole(dense), first, budget)
    both = compose(dense, done, Plan("third", (("4", 5, (1, 4)), ("2", 4, (3,)))), budget)
    assert both.keep == (("2", 4, (3,)), ("4", 8, (2, 7)))
    assert widths(dense, both) == {"0": 2, "2": 1, "4": 2}
    assert dict(both.achieved)["units"] == pytest.approx(5 / 14)
    with pytest.raises(PlanError, match="5 units left"):
        compose(dense, done, Plan("third", (("4", 8, (1,)),)), budget)


def test_a_relative_budget_counts_groups_that_have_nothing_left() -> None:
    data = resolve.dataset(loads(TINY).data, 0)
    dense = traced(resolve.model(loads(TINY), data), data)
    budget = Budget(units=6 / 14)
    done = compose(dense, whole(dense), Plan("x", (("0", 2, (0,)), ("4", 8, (0, 1, 2, 3)))), budget)
    small = traced(sc.compact(dense, done), data)
    # 9 of 14 units stay, one of them in a group that cannot shrink; 6 are asked, so 5 of the 8 free ones
    assert relative(dense, done, small, budget).keep == pytest.approx(5 / 8)


def test_a_failed_proof_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur import cutting
    from secateur.types import Check, Proof

    def wrong(graph: object, groups: list[str], joint: bool) -> Proof:
        return Proof((Check(groups[0], "permutation", 1.0, 1e-5, False),))

    monkeypatch.setattr(cutting, "verify", wrong)
    with pytest.raises(VerificationError, match=r"prune\.freeze"):
        pipeline.run(tiny(tmp_path / "out", "prune.schedule.steps=1"))
    assert not (tmp_path / "out" / "pruned.safetensors").exists()


def test_stages_follow_the_schedule() -> None:
    assert plan_stages(2) == [("train", 0), ("cut", 1), ("recover", 1), ("cut", 2), ("recover", 2)]
    targets = lambda *words: resolve.targets(loads(TINY, overrides=words), 14)  # noqa: E731
    assert len(targets("prune.schedule={name: once, steps: 9}")) == 1
    assert targets("prune.schedule={name: every, units: 3}", "prune.round_to=null") == pytest.approx(
        (11 / 14, 8 / 14, 0.43)
    )


def test_every_takes_so_many_units_at_a_time_and_trains_so_many_steps_between(tmp_path: Path) -> None:
    folder = pipeline.run(tiny(tmp_path / "out", *options("every")))
    records = read(folder / "records.jsonl")
    kept = [round(r.data["achieved"]["units"] * 14) for r in records if r.stage == "cut"]
    assert kept == [11, 8, 6]
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert dict(plan.achieved)["units"] == pytest.approx(6 / 14)
    rows = [(r.data["step"], r.data["epoch"]) for r in records if r.stage == "epoch"]
    # 200 images are 7 steps of 32: 9 steps are a whole epoch and two steps
    assert rows == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize(("drop", "back_to"), [(0.01, 0), (0.2, 3), (0.99, None)])
def test_a_run_stops_when_too_much_is_lost_and_keeps_the_model_before(
    drop: float, back_to: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        f"prune.stop_drop={drop}",
        "prune.schedule.steps=5",
        "prune.budget={units: 0.3}",
        "model={name: small_cnn}",
        "prune.round_to=null",
    ]
    recipe = tiny(tmp_path / "out", "train={epochs: 12, lr: 0.01}", "recover={name: none}", *words)

    def stopping(*things: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "finish", stopping)  # after the decision to stop, before anything is shipped
        with pytest.raises(Stop):
            pipeline.run(recipe)
    folder = pipeline.run(recipe, resume=True)
    records = read(folder / "records.jsonl")
    dense = next(r.data["top1"] for r in records if r.stage == "dense")
    tried = [r.data["top1"] for r in records if r.stage == "recovered"]
    stopped = [r.data for r in records if r.stage == "stopped"]
    assert all(dense - top1 <= drop for top1 in tried[: len(tried) - len(stopped)])
    assert [row["back_to"] for row in stopped] == ([] if back_to is None else [back_to])
    plan = Plan.from_json((folder / "plan.json").read_text())
    if stopped:
        assert dense - tried[-1] > drop
        assert stopped[0]["back_to"] == len(tried) - 1
        shown = {row["name"]: row["kept"] for row in view(records)["groups"]}
        assert all(shown[name] == len(kept) for name, _, kept in plan.keep)
        before = folder / "plans" / f"step_{len(tried) - 1}.json"
        assert plan.keep == (Plan.from_json(before.read_text()).keep if len(tried) > 1 else ())
        measured = next(r.data for r in records if r.stage == "measure")["measurements"]["pruned"]
        held = next(m["value"] for m in measured if m["name"] == "validation top1")
        assert held == pytest.approx(stopped[0]["top1"]) == pytest.approx([dense, *tried][len(tried) - 1])
    assert not (folder / "held.safetensors").exists()


def test_a_run_starts_from_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    path = json.dumps(str(finished / "dense.safetensors"))
    folder = pipeline.run(tiny(tmp_path / "out", f"model.checkpoint={path}", "train.epochs=0"))
    one, two = (sc.load(f / "dense.safetensors").state_dict() for f in (finished, folder))
    assert all(torch.equal(one[key], two[key]) for key in one)

"""The command line: every command, every kind of mistake, one message and an exit code each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import secateur as sc
from packed import write_packed
from secateur.cli import app
from secateur.train import resume

RECIPE = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 400, normalize: true}
train: {epochs: 3, lr: 0.01}
prune: {criterion: {samples: 64}, schedule: {steps: 2}}
measure: {repeats: 1, batch_sizes: [1]}
"""


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def error(*words: object) -> str:
    """The one message of a failing call: exit code 1, nothing on stdout but progress, no traceback."""
    result = call(*words)
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    out = recipe.parent / "out"
    result = call("run", recipe, "--out", out, "seed=3")
    assert result.exit_code == 0, result.output
    assert "What was cut" in result.stdout
    assert "parameters" in result.stdout
    assert str(out / "report.html") in result.stdout
    return out


@pytest.mark.parametrize(
    "command",
    ["run", "inspect", "evaluate", "predict", "bench", "init", "schema", "report", "compare", "sweep", "track push"],
)
def test_every_command_has_help(command: str) -> None:
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_the_run_is_that_of_the_recipe_and_the_overrides(finished: Path) -> None:
    assert "seed: 3" in (finished / "recipe.yaml").read_text()


def test_evaluate(finished: Path) -> None:
    result = call("evaluate", finished / "pruned.safetensors", "--part", "validation")
    assert result.exit_code == 0, result.output
    assert "pruned.safetensors on 144 validation images of digits" in result.stdout
    assert "validation top1" in result.stdout
    assert call("evaluate", finished / "pruned.safetensors", "--part", "all").exit_code == 2


def test_predict_prints_index_name_and_probability(finished: Path, tmp_path: Path) -> None:
    from secateur.data import SOURCES
    from secateur.infer import open_model

    source = SOURCES["digits"]()
    reader = open_model(finished / "dense.safetensors")
    for number in range(3):
        pixels = (source.images[number, 0].float() * 255 / 16).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    images = [tmp_path / f"{number}.png" for number in range(3)]
    result = call("predict", finished / "dense.safetensors", *images, "--top", 2)
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(path) for path in images for _ in range(2)]
    with torch.no_grad():
        inputs = (source.images[:3].float() / 16 - reader.mean[0]) / reader.std[0]
        expected = reader.model(inputs).softmax(1).topk(2)
    assert [int(row[1]) for row in rows] == expected.indices.flatten().tolist()
    assert [row[2] for row in rows] == [source.classes[int(row[1])] for row in rows]
    assert [float(row[3]) for row in rows] == pytest.approx(expected.values.flatten().tolist(), abs=0.01)


def test_predict_takes_images_of_any_size_and_mode(finished: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (50, 31), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert call("predict", finished / "pruned.safetensors", tmp_path / "a.png", "--invert").exit_code == 0


def test_inspect_shows_groups_and_reasons(finished: Path) -> None:
    result = call("inspect", "s3", "--verify")
    assert result.exit_code == 0, result.output
    assert "63,122 parameters" in result.stdout
    assert "output of the model" in result.stdout
    assert "permutation" in result.stdout
    assert "(1, 1, 8, 8)" in call("inspect", finished / "pruned.safetensors").stdout
    assert "(2, 3, 16, 16)" in call("inspect", "resnet20", "depth=8", "--input-shape", "2,3,16,16").stdout
    spec = "torch.nn:Embedding"
    words = (spec, "num_embeddings=9", "embedding_dim=4", "--input-shape", "1,5", "--integers")
    assert call("inspect", *words).exit_code == 0


def test_init_writes_a_recipe_that_loads_and_keeps_what_is_there(tmp_path: Path) -> None:
    from secateur.recipe import load

    path = tmp_path / "mine.yaml"
    assert call("init", path).exit_code == 0
    assert load(path).name == "first"
    assert "exists" in error("init", path)


def test_schema_is_json() -> None:
    assert json.loads(call("schema").stdout)["title"] == "Recipe"


def test_report_is_made_again(finished: Path) -> None:
    before = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    assert call("report", finished).exit_code == 0
    assert len((finished / "report.html").read_bytes()) == pytest.approx(len(before), abs=40)
    assert "folder of a run" in error("report", finished / "plans")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.lrr=1", "did you mean 'lr'?"),
        ("train.epochs=many", "must be a valid integer"),
        ("prune.budget={units: 2}", "less than or equal to 1"),
        ("prune.budget={params: 0.001}", "params"),
        ("model.name=nowhere.at.all:net", "nowhere"),
        ("model.name=torchvision:resnet19", "resnet18"),
        ("model={name: s3, args: {widths: 3}}", "s3"),
        ("model.checkpoint=/no/file.safetensors", "/no/file.safetensors"),
        ("data={name: mnist, root: /no/such/folder}", "not a folder"),
        ("data.limit=0", "greater than or equal to 1"),
        ("train={epochs: 1, lr: 1.0e+30, optimizer: sgd}", "loss is"),
        ("prune.freeze=[layer9]", "matches no group"),
        ("device=cuda:63", "CUDA devices"),
        ("train", "key=value"),
    ],
)
def test_mistakes_in_a_run(override: str, part: str, recipe: Path, tmp_path: Path) -> None:
    assert part in error("run", recipe, override, "--out", tmp_path / "out")
    left = [path.name for path in tmp_path.rglob("*")]
    assert not any(name.endswith((".tmp", "pruned.safetensors", "report.html")) for name in left), left


def test_a_truncated_data_folder(recipe: Path, tmp_path: Path) -> None:
    write_packed(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-500])
    assert "truncated" in error("run", recipe, f"data={{name: mnist, root: {tmp_path}}}", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_corrupt_and_foreign_checkpoints(finished: Path, recipe: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    raw = bytearray((finished / "pruned.safetensors").read_bytes())
    raw[-3] ^= 255
    broken.write_bytes(raw)
    foreign = tmp_path / "foreign.safetensors"
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, foreign)
    bare = sc.save(torch.nn.Linear(2, 2), tmp_path / "bare.safetensors")
    for path, part in (
        (broken, "digest"),
        (foreign, "not of secateur"),
        (bare, "inputs and classes"),
        (tmp_path, "file"),
    ):
        assert part in error("evaluate", path)
        assert part in error("predict", path, "x.png")
    assert "does not fit" in error("run", recipe, f"model.checkpoint={foreign}", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_graph_is_refused_on_resume(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    state = interrupted(recipe, out)
    plan = json.loads(state.plan or "")
    plan["fingerprint"] = "0" * 16
    plan["keep"] = [{"group": "0", "units": 2, "kept": 1, "bits": "gA=="}]
    from dataclasses import replace

    resume.write_state(out / "state.safetensors", replace(state, stage=1, plan=json.dumps(plan)))
    assert "is for graph 0000000000000000" in error("run", recipe, "--out", out, "--resume")


def interrupted(recipe: Path, out: Path) -> resume.State:
    """A run that was stopped at its first cut, and its state."""
    from secateur import stages

    with pytest.MonkeyPatch.context() as patch:

        def stop(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(stages, "score", stop)
        result = call("run", recipe, "--out", out)
    assert result.exit_code == 130
    assert f"Continue with: secateur run {recipe} --out {out} --resume" in result.stderr
    return resume.read_state(out / "state.safetensors")


def test_ctrl_c_leaves_a_run_that_resumes(recipe: Path, tmp_path: Path) -> None:
    interrupted(recipe, tmp_path / "out")
    assert call("run", recipe, "--out", tmp_path / "out", "--resume").exit_code == 0
    again = call("run", recipe, "--out", tmp_path / "out", "--resume")
    assert again.exit_code == 0
    assert "is complete" in again.stdout


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_full_disk_is_one_message_and_leaves_no_half_file(
    after: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > after * 3:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert "No space left on device" in error("run", recipe, "--out", tmp_path / "out")
    monkeypatch.undo()
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert not any(name.endswith(".tmp") for name in left)
    for path in (tmp_path / "out").glob("*.safetensors"):
        if path.name == "state.safetensors":
            resume.read_state(path)
        else:
            sc.load(path)
    assert call("run", recipe, "--out", tmp_path / "out", "--resume").exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_leave_a_run_that_resumes(number: signal.Signals, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "secateur", "run", str(recipe), "train.epochs=500", "--out", str(out)]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells start background jobs without it
    ) as process:
        deadline = time.monotonic() + 240
        while not (out / "state.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, message = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    if number != signal.SIGKILL:
        assert message.startswith("error: interrupted. Continue with: ")
        assert "Traceback" not in message
    state = resume.read_state(out / "state.safetensors")
    assert 0 < state.point.cursor.epoch <= 500
    assert not (out / "pruned.safetensors").exists()


def test_without_arguments_it_shows_help_and_unknown_commands_fail() -> None:
    assert "Commands" in call().output
    assert call("prun").exit_code == 2
    assert call("--version").stdout.strip()

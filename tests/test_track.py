"""Runs in an MLflow store: a real local one; what is there twice, missing, changed, or cannot be reached."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur import pipeline
from secateur.cli import app
from secateur.recipe import loads
from secateur.report.figures import Line, chart, standalone
from secateur.track.local import read
from secateur.track.mlflow import TrackError, bare, push
from secateur.track.values import metrics, params
from secateur.train.loop import Point
from secateur.train.resume import State, write_state
from secateur.types import Record

TINY = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 200}
train: {epochs: 2, lr: 0.003}
prune: {criterion: {samples: 64}, schedule: {steps: 2}}
recover: {epochs: 1}
measure: {repeats: 1, batch_sizes: [1]}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(loads(TINY), tmp_path_factory.mktemp("runs") / "first")


def test_metrics_are_the_records(finished: Path) -> None:
    records = read(finished / "records.jsonl")
    found = {(row.name, row.step): row.value for row in metrics(records)}
    epochs = [r.data for r in records if r.stage == "epoch"]
    assert [found["train_loss", step] for step in range(1, 5)] == [row["train_loss"] for row in epochs]
    cuts = {r.data["step"]: r.data for r in records if r.stage == "cut"}
    assert found["cut/after_top1", 2] == cuts[2]["after"]["top1"]
    assert found["keep/units", 1] == cuts[1]["achieved"]["units"]
    measured = next(r.data for r in records if r.stage == "measure")["measurements"]
    for name, rows in measured.items():
        for row in rows:
            words = row["name"].replace(" ", "_")
            assert found[f"{name}/{words}", 0] == row["value"]
            assert found[f"{name}/{words}.spread", 0] == row["spread"]
    assert len(found) == len(metrics(records))


def test_what_is_not_finite_is_no_metric() -> None:
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "rate")
    (row,) = metrics([Record("epoch", {**dict.fromkeys(names), "rate": 0.5}, 1.0)])
    assert (row.name, row.value, row.step) == ("rate", 0.5, 1)


def test_names_that_a_store_refuses_are_written_so_that_it_takes_them() -> None:
    found = params({"prune": {"keep": {"layer1.*": 0.5, "layer1.?": 0.25}}, "out": None, "track": {"mlflow": "x"}})
    assert len(found) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in found)
    assert sorted(found.values()) == ["0.25", "0.5", "None"]
    assert bare("not http://me:secret@host/a@b but http://host:5") == "not http://host/a@b but http://host:5"


def test_a_figure_alone_is_a_whole_file() -> None:
    from xml.etree import ElementTree

    svg = standalone(chart("t", [Line("a", "train", [(0, 0.0), (1, 1.0)])], []))
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "<style>" in svg


def test_without_mlflow_it_says_what_to_install(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    done = CliRunner().invoke(app, ["track", "push", str(finished)])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: pushing needs MLflow")
    assert "secateur[track]" in done.stderr


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"stage": "end", "time": 1}\n')
    with pytest.raises(TrackError, match="no record of a start"):
        push(tmp_path)


@pytest.mark.filterwarnings("ignore")  # those of MLflow and its dependencies
class TestStore:
    """With MLflow installed: a store in a file."""

    @pytest.fixture(scope="class")
    def empty(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A store without a run: MLflow takes seconds to make its tables."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("mlflow", reason="the extra `track` is not installed")
            path = tmp_path_factory.mktemp("empty") / "store.db"
            self.client(f"sqlite:///{path}").search_experiments()
        return path

    @pytest.fixture
    def store(self, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.chdir(tmp_path)
        shutil.copy(empty, tmp_path / "store.db")
        return f"sqlite:///{tmp_path / 'store.db'}"

    def client(self, store: str) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(store)

    def runs(self, store: str, name: str = "tiny") -> list[Any]:
        client = self.client(store)
        return list(client.search_runs([client.get_experiment_by_name(name).experiment_id]))

    def files(self, store: str, run: str, path: str | None = None) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in self.client(store).list_artifacts(run, path):
            found |= self.files(store, run, entry.path) if entry.is_dir else {entry.path: entry.file_size}
        return found

    def test_a_push_brings_everything_and_a_second_one_nothing(self, store: str, finished: Path) -> None:
        before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
        first = push(finished, store)
        second = push(finished, store)
        assert (second.run, second.params, second.metrics, second.files) == (first.run, 0, 0, ())
        (run,) = self.runs(store)
        start = read(finished / "records.jsonl")[0]
        assert run.data.tags["secateur.recipe"] == start.data["hash"]
        assert run.info.status == "FINISHED"
        assert run.info.start_time == round(start.time * 1000)
        assert run.data.params["train.lr"] == "0.003"
        assert run.data.params["prune.criterion.name"] == "taylor"
        for row in metrics(read(finished / "records.jsonl")):
            history = {m.step: m.value for m in self.client(store).get_metric_history(first.run, row.name)}
            assert history[row.step] == row.value
        found = self.files(store, first.run)
        expected = {str(path.relative_to(finished)): len(data) for path, data in before.items()}
        assert {name: size for name, size in found.items() if not name.startswith("figures/")} == expected
        assert {name for name in found if name.startswith("figures/")} == {"figures/loss.svg", "figures/accuracy.svg"}
        assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    def test_a_run_that_went_on_gets_only_what_is_new(self, store: str, finished: Path, tmp_path: Path) -> None:
        """An unfinished run is pushed, then the rest of it."""
        lines = (finished / "records.jsonl").read_text().splitlines(keepends=True)
        folder = tmp_path / "young"
        folder.mkdir()
        (folder / "recipe.yaml").write_bytes((finished / "recipe.yaml").read_bytes())
        (folder / "records.jsonl").write_text("".join(lines[:5]))
        with pytest.raises(TrackError, match="no state yet"):
            push(folder, store, "other")
        write_state(folder / "state.safetensors", State(0, 4, Point(), {}))
        taken_back = {**json.loads(lines[4]), "train_loss": 1e9}  # after the saved state: dropped when it is resumed
        (folder / "records.jsonl").write_text("".join([*lines[:4], json.dumps(taken_back) + "\n"]))
        first = push(folder, store, "other")
        (run,) = self.runs(store, "other")
        assert run.info.status == "RUNNING"
        assert "state.safetensors" not in self.files(store, first.run)
        (folder / "records.jsonl").write_text("".join(lines))
        second = push(folder, store, "other")
        assert second.run == first.run
        assert second.params == 0
        assert first.metrics + second.metrics == len(metrics(read(folder / "records.jsonl")))
        assert set(second.files) == {"records.jsonl", "figures/loss.svg", "figures/accuracy.svg"}
        (run,) = self.runs(store, "other")
        assert run.info.status == "FINISHED"
        history = self.client(store).get_metric_history(first.run, "train_loss")
        assert [row.step for row in sorted(history, key=lambda row: row.step)] == [1, 2, 3, 4]
        assert 1e9 not in {row.value for row in history}

    def test_a_store_that_fails_half_way_gets_the_rest_later(
        self, store: str, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        real, sent = MlflowClient.log_artifact, []

        def failing(self: Any, run: str, path: str, where: str | None = None) -> None:
            if len(sent) == 4:
                raise MlflowException("the server went away")
            sent.append(path)
            real(self, run, path, where)

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_artifact", failing)
            with pytest.raises(TrackError, match=r"went away\. Nothing in .* was changed; push again"):
                push(finished, store)
        (run,) = self.runs(store)
        assert run.info.status == "RUNNING"
        rest = push(finished, store)
        assert (rest.run, rest.params, rest.metrics) == (run.info.run_id, 0, 0)
        assert len(rest.files) == len(self.files(store, rest.run)) - 4
        assert len(self.runs(store)) == 1

    def test_a_file_that_was_deleted_in_the_store_comes_back(self, store: str, finished: Path, tmp_path: Path) -> None:
        first = push(finished, store)
        (path,) = tmp_path.rglob("report.html")
        path.unlink()
        assert push(finished, store).files == ("report.html",)
        assert first.files.count("report.html") == 1

    def test_two_runs_of_one_recipe_are_two(self, store: str, finished: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        head, *lines = (finished / "records.jsonl").read_text().splitlines(keepends=True)
        later = head.replace('"time": 1', '"time": 2', 1)
        assert later != head
        (other / "records.jsonl").write_text("".join([later, *lines]))
        assert push(finished, store).run != push(other, store).run
        assert len(self.runs(store)) == 2

    def test_a_server_that_is_down_is_one_message(self, store: str, finished: Path) -> None:
        for uri, part in (
            ("http://127.0.0.1:9", "http://127.0.0.1:9 did not take the run"),
            ("ftp://nowhere", "ftp://nowhere did not take the run"),
            ("sqlite:////no/such/folder/store.db", "/no/such/folder is no folder"),
        ):
            done = CliRunner().invoke(app, ["track", "push", str(finished), "--uri", uri])
            assert done.exit_code == 1
            assert done.stderr.splitlines()[-1].startswith("error: ")
            assert part in done.stderr
            assert "Traceback" not in done.output

    def test_the_command(self, store: str, finished: Path) -> None:
        words = ["track", "push", str(finished), "--uri", store, "--experiment", "mine"]
        count = len(params(read(finished / "records.jsonl")[0].data["recipe"]))
        assert f"of experiment mine: {count} parameters" in CliRunner().invoke(app, words).stdout
        assert "0 parameters, 0 metric values, 0 files added" in CliRunner().invoke(app, words).stdout

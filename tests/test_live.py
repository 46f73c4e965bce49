"""Runs copied to MLflow while they work: a real server that is killed, one that is down, and copies that hang."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur import pipeline, resolve
from secateur.cli import app
from secateur.recipe import loads
from secateur.report import render
from secateur.session import Screen
from secateur.track import follow, live
from secateur.track.local import read
from secateur.track.mlflow import TrackError, push
from secateur.track.values import metrics, params
from secateur.types import RecipeError

TINY = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 200}
train: {epochs: 6, lr: 0.003}
prune: {criterion: {samples: 64}, schedule: {steps: 2}, keep: {'*': 0.9}}
recover: {epochs: 1}
measure: {repeats: 1, batch_sizes: [1]}
"""
PATIENCE = 120.0  # seconds, on a machine that does other things too


def until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


class Server:
    """`mlflow server`, by the documented command, on one port and one SQLite file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        words = ["server", "--workers", "1", "--host", "127.0.0.1", "--port", str(self.port)]
        stores = ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "./artifacts"]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.folder / "server.txt", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words, *stores],
                cwd=self.folder,
                env=env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.txt").read_text()
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """Kill the server and its workers at once, whatever they do."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mlflow", reason="the extra `track` is not installed")
        pytest.importorskip("flask", reason="what `mlflow server` needs is not installed")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    found = Server(tmp_path)
    yield found
    found.kill()


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def files(uri: str, run: str, path: str | None = None) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in client(uri).list_artifacts(run, path):
        found |= files(uri, run, entry.path) if entry.is_dir else {entry.path: entry.file_size}
    return found


def check_whole(uri: str, folder: Path) -> None:
    """The one run of the store holds every value of the records, once, and every file of the folder."""
    asked = client(uri)
    (run,) = asked.search_runs([asked.get_experiment_by_name("mine").experiment_id])
    number, records = run.info.run_id, read(folder / "records.jsonl")
    expected = sorted((row.name, row.step, row.value, round(row.time * 1000)) for row in metrics(records))
    found = [
        (name, row.step, row.value, row.timestamp)
        for name in run.data.metrics
        for row in asked.get_metric_history(number, name)
    ]
    assert len(expected) > 50
    assert sorted(found) == expected
    assert run.data.params == params(records[0].data["recipe"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["secateur.recipe"] == records[0].data["hash"]
    assert run.data.tags["mlflow.source.git.commit"] == records[0].data["revision"]["commit"]
    here = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    there = files(uri, number)
    assert {name: size for name, size in there.items() if not name.startswith("figures/")} == here
    assert {name for name in there if name.startswith("figures/")} == {"figures/loss.svg", "figures/accuracy.svg"}


@pytest.fixture(autouse=True)
def _committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export of the sources has no repository; the tests are about what is done with a revision."""
    monkeypatch.setattr(pipeline, "revision", lambda folder: {"commit": "c" * 40, "dirty": True})


@pytest.mark.filterwarnings("ignore")  # those of MLflow and its dependencies
class TestServer:
    def test_a_server_killed_in_mid_run_and_restarted_misses_nothing(self, server: Server, tmp_path: Path) -> None:
        server.up()
        until(server.answers)
        lines: list[str] = []

        def line(text: str) -> None:
            lines.append(text)
            if text.startswith("train, epoch 3/"):
                until(lambda: self.arrived(server.uri))  # it logs while it works
                server.kill()
            elif text.startswith("note: the run goes on without MLflow"):
                server.up()

        options = [f"track={{mlflow: '{server.uri}', experiment: mine, wait: {PATIENCE}}}"]
        folder = pipeline.run(loads(TINY, overrides=options), tmp_path / "run", screen=Screen(line))
        assert sum(text.startswith("note: the run goes on") for text in lines) == 1
        assert "MLflow answers again and has what it missed" in lines
        check_whole(server.uri, folder)
        again = push(folder, server.uri, "mine")
        assert (again.params, again.metrics, again.files) == (0, 0, ())

    def arrived(self, uri: str) -> bool:
        asked = client(uri)
        found = asked.get_experiment_by_name("mine")
        runs = asked.search_runs([found.experiment_id]) if found else []
        return any("train_loss" in run.data.metrics and run.info.status == "RUNNING" for run in runs)

    def test_a_server_that_is_down_all_the_time_gets_everything_by_a_push(self, server: Server, tmp_path: Path) -> None:
        lines: list[str] = []
        options = [f"track={{mlflow: '{server.uri}', experiment: mine, wait: 0.1}}"]
        folder = pipeline.run(loads(TINY, overrides=options), tmp_path / "run", screen=Screen(lines.append))
        assert lines[-1].endswith(f"send the rest with: secateur track push {folder}")
        assert read(folder / "records.jsonl")[-1].stage == "end"
        server.up()
        until(server.answers)
        done = CliRunner().invoke(app, ["track", "push", str(folder)])  # the recipe says where to
        assert done.exit_code == 0, done.output
        check_whole(server.uri, folder)


@pytest.mark.filterwarnings("ignore")
def test_a_run_killed_and_resumed_is_one_run_with_nothing_twice(server: Server, tmp_path: Path) -> None:
    """The run is killed after records that its saved state does not count; a store in a file is followed."""
    store = f"sqlite:///{tmp_path / 'store.db'}"
    options = [f"track={{mlflow: '{store}', experiment: mine, wait: {PATIENCE}}}"]
    recipe, folder = loads(TINY, overrides=options), tmp_path / "run"

    def line(text: str) -> None:
        if text.startswith("train, epoch 4/"):
            until((tmp_path / "store.db").exists)
            raise Killed

    with pytest.raises(Killed):
        pipeline.run(recipe, folder, screen=Screen(line))
    before = read(folder / "records.jsonl")
    pipeline.run(recipe, folder, resume=True)
    after = read(folder / "records.jsonl")
    assert before[-1].stage == "epoch"
    assert before[-1].time not in {record.time for record in after}  # it was taken back
    check_whole(store, folder)


class Killed(Exception):
    """Stands for the death of a run between a record and the saved state that counts it."""


def test_a_copy_that_hangs_neither_slows_nor_keeps_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(live, "WORDS", ("-S", "-c", "import time; time.sleep(600)"))
    lines: list[str] = []
    begin = time.monotonic()
    with live.following("http://127.0.0.1:9", None, 0.2, lines.append) as news:
        for _ in range(70_000):  # more than a pipe holds
            news(tmp_path)
    assert time.monotonic() - begin < 20
    assert lines == [f"MLflow does not have all of this run yet; send the rest with: secateur track push {tmp_path}"]


def test_a_copy_that_dies_or_cannot_start_leaves_the_run_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for words in (("-S", "-c", "raise SystemExit(3)"), ("-S", "-c", "import os; os.close(0); os._exit(1)")):
        monkeypatch.setattr(live, "WORDS", words)
        lines: list[str] = []
        with live.following("x", None, 30, lines.append) as news:
            time.sleep(0.3)
            news(tmp_path)
            news(tmp_path)
        assert ["send the rest" in text for text in lines] == [True]
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    lines = []
    with live.following("x", None, 30, lines.append) as news:
        news(tmp_path)
    assert ["goes" in lines[0] or "is not copied" in lines[0], "send the rest" in lines[1]] == [True, True]


def test_an_error_in_the_run_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "WORDS", ("-S", "-c", "import time; time.sleep(600)"))
    begin = time.monotonic()
    with pytest.raises(KeyError), live.following("x", None, 600, print):
        raise KeyError
    assert time.monotonic() - begin < 1.5


class Failing:
    """Stands for a copy that fails so many times."""

    def __init__(self, times: int) -> None:
        self.left, self.tries = times, 0

    def __call__(self, files: bool, last: bool) -> None:
        self.tries += 1
        self.left -= 1
        if self.left >= 0:
            raise TrackError("the store at http://me:secret@host is down\nreally")


def test_failures_are_told_once_and_tried_again_with_growing_pauses(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clock = 100.0
    monkeypatch.setattr(follow.time, "monotonic", lambda: clock)
    monkeypatch.setattr(follow, "tell", lambda text: told.append(text))
    told: list[str] = []
    follower = follow.Follower(follow.Settings(str(tmp_path), "x", None, 0.0))
    monkeypatch.setattr(follower, "_copy", Failing(9))
    pauses = []
    while not follower.copied():
        pauses.append(follower.next - clock)
        clock = follower.next
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert [text.split(":")[0] for text in told] == ["note", "MLflow answers again and has what it missed"]


def test_the_end_comes_through_a_pause_and_is_tried_until_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(follow, "OFTEN", 0.01)
    monkeypatch.setattr(follow.signal, "setitimer", lambda *rest: None)
    monkeypatch.setattr(follow, "tell", lambda text: None)
    for failures, whole in ((3, True), (10**9, False)):
        follower = follow.Follower(follow.Settings(str(tmp_path), "x", None, 0.3))
        copy = Failing(failures)
        monkeypatch.setattr(follower, "_copy", copy)
        reading, writing = os.pipe()
        os.write(writing, follow.NEWS + follow.END)
        assert follow.follow(reading, follower) is whole
        assert copy.tries > 3
        os.close(reading)
        os.close(writing)


def test_what_cannot_be_tracked_is_said_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"mlflow is not installed; install the extra `track`"):
        pipeline.run(loads(TINY, overrides=["track.mlflow=http://x"]), tmp_path / "run")
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_URI is not set"):
        pipeline.run(loads(TINY, overrides=["track.mlflow=env"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert resolve.tracking(loads(TINY, overrides=["track.mlflow=env"])) == "http://there"
    assert resolve.tracking(loads(TINY)) is None  # the environment alone starts nothing
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_PASSWORD"):
        loads(TINY, overrides=["track.mlflow=http://me:secret@host"])


def test_where_to_is_no_part_of_what(tmp_path: Path) -> None:
    assert loads(TINY).hash == loads(TINY, overrides=["track.mlflow=http://x", "track.wait=1"]).hash
    assert loads(TINY).hash != loads(TINY, overrides=["seed=1"]).hash


def test_the_revision_is_in_the_records_and_on_the_page(tmp_path: Path) -> None:
    folder = pipeline.run(loads(TINY, overrides=["train.epochs=1", "prune.schedule.steps=1"]), tmp_path / "run")
    records = read(folder / "records.jsonl")
    assert records[0].data["revision"] == {"commit": "c" * 40, "dirty": True}
    assert f"git {'c' * 12} with changes" in (folder / "report.html").read_text()
    bare = [type(r)(r.stage, {k: v for k, v in r.data.items() if k != "revision"}, r.time) for r in records]
    assert "git cccc" not in render(bare)  # records of before are shown too


def test_a_run_is_at_the_revision_of_its_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(pipeline, "revision", lambda folder: asked.append(folder))
    monkeypatch.setattr(pipeline, "_carry_out", lambda *rest: (_ for _ in ()).throw(RecipeError("enough")))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "r.yaml").write_text(TINY)
    for words in ([], ["--source", str(tmp_path)]):
        CliRunner().invoke(app, ["run", str(tmp_path / "sub" / "r.yaml"), "--out", str(tmp_path / "o"), *words])
    assert asked == [tmp_path / "sub", tmp_path]

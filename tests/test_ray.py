"""Sweeps on a Ray cluster: what a worker does for a cell, and a real two-node cluster that loses a node."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import secateur as sc
from secateur import attend, cluster
from secateur.attend import Order
from secateur.cli import app
from secateur.recipe import load
from secateur.track.local import read
from secateur.types import SecateurError

TINY = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 200}
train: {epochs: 40, lr: 0.003}
prune: {criterion: {samples: 64}}
recover: {epochs: 1}
measure: {repeats: 1, batch_sizes: [1]}
"""


def order(folder: Path, code: str) -> Order:
    records = folder / "records.jsonl"
    words = ["-S", "-c", code, str(records)]
    return Order(words, str(folder), {"SEEN": "1"}, str(records), str(folder / "log"), str(folder / "lock"), 5.0)


END = "import sys; open(sys.argv[1], 'w').write('{\"stage\": \"end\", \"time\": 1}\\n'); print('told')"


def test_a_worker_runs_the_command_and_says_how_it_ended(tmp_path: Path) -> None:
    done = attend.attend(order(tmp_path, END))
    assert (done.code, done.complete) == (0, True)
    (tmp_path / "records.jsonl").unlink()
    code = "import os, sys; assert os.environ['SEEN']; print(os.getcwd()); sys.exit(7)"
    done = attend.attend(order(tmp_path, code))
    assert (done.code, done.complete) == (7, False)
    assert (tmp_path / "log").read_text().splitlines() == ["told", str(tmp_path)]  # tries are kept one after another
    assert attend.attend(order(tmp_path, "import os; os.kill(os.getpid(), 9)")).code == -9


def test_a_node_without_the_shared_folder_is_named(tmp_path: Path) -> None:
    done = attend.attend(replace(order(tmp_path, END), cwd=str(tmp_path / "gone")))
    assert done.code is None
    assert "must share the file system" in done.text
    assert not done.lost


def test_two_never_work_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "TURN", 0.3)
    with open(tmp_path / "lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = attend.attend(order(tmp_path, END))
        assert (done.code, done.lost) == (None, True)
        assert not (tmp_path / "records.jsonl").exists()
    assert attend.attend(order(tmp_path, END)).complete


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a process to its parent")
def test_a_run_dies_with_its_worker(tmp_path: Path) -> None:
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    words = (
        "from pathlib import Path; from test_ray import order; from secateur.attend import attend; "
        f"attend(order(Path({str(tmp_path)!r}), {code!r}))"
    )
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, (here, here.parent, here.parent / "src"))])}
    with subprocess.Popen([sys.executable, "-c", words], env=env) as worker:
        written = tmp_path / "pid"
        wait_for(lambda: written.exists() and written.read_text())
        worker.send_signal(signal.SIGKILL)
    wait_for(lambda: not alive(int(written.read_text())))
    assert attend.attend(order(tmp_path, END)).complete  # and its lock went with it


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(what: Any, patience: float = 120.0) -> None:
    end = time.monotonic() + patience
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


@pytest.mark.parametrize("address", ["ray://host:10001", "host", "127.0.0.1:9", "127.0.0.1:99999"])
def test_wrong_addresses_are_refused_at_once(address: str) -> None:
    begin = time.monotonic()
    with pytest.raises(SecateurError, match="HOST:PORT of the head node"):
        cluster._check_answers(address)
    assert time.monotonic() - begin < 10


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text(TINY)
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["sweep", str(tmp_path / "r.yaml"), "--grid", "seed=0", "--ray", "auto", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "secateur[cluster]" in done.stderr
    done = CliRunner().invoke(app, [*words, "device=cuda"])
    assert "give --gpus 1" in done.stderr


class TestCluster:
    """A real cluster: a head without processors, and two nodes with one each."""

    @pytest.fixture
    def nodes(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any, list[Any]]]:
        for key, value in cluster.ENVIRONMENT.items():
            monkeypatch.setenv(key, value)
        source = Path(sc.__file__).parent.parent
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]))
        pytest.importorskip("ray", reason="the extra `cluster` is not installed")
        from ray.cluster_utils import Cluster

        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        workers = [found.add_node(num_cpus=1) for _ in range(2)]
        yield found.address, found, workers
        found.shutdown()

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.filterwarnings("ignore")  # those of Ray
    def test_a_sweep_survives_a_node_that_is_killed(self, nodes: tuple[str, Any, list[Any]], tmp_path: Path) -> None:
        address, found, workers = nodes
        recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
        recipe.write_text(TINY)
        grid = ["--grid", "seed=0,1,2,3", "--ray", address, "--out", str(out)]
        words = [sys.executable, "-m", "secateur", "sweep", str(recipe), *grid]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            states = [out / f"seed={seed}" / "state.safetensors" for seed in range(4)]
            wait_for(lambda: sum(state.exists() for state in states) >= 2)  # both nodes are at work
            found.remove_node(workers[0], allow_graceful=False)  # killed with all that runs there
            said, _ = process.communicate(timeout=560)
        assert process.returncode == 0, said
        assert "it goes on from its saved state elsewhere" in said
        assert "4 of 4: " in said
        stages = [[r.stage for r in read(out / f"seed={seed}" / "records.jsonl")] for seed in range(4)]
        assert [row[-1] for row in stages] == ["end"] * 4
        (resumed,) = [seed for seed, row in enumerate(stages) if "resume" in row]
        assert "4 runs compared" in (out / "compare.html").read_text()
        alone = load(recipe, [f"seed={resumed}", f"out={str(tmp_path / 'alone')!r}"])
        one, two = (sc.load(path / "pruned.safetensors").state_dict() for path in (out / f"seed={resumed}", run(alone)))
        assert all(torch.equal(one[key], two[key]) for key in one)


def run(recipe: Any) -> Path:
    from secateur import pipeline

    return pipeline.run(recipe)

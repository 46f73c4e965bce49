"""Several processes under torchrun (gloo): they equal one process, stop together, resume, and refuse to disagree."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import together

from secateur import pipeline, recipe
from secateur.data.augment import AUGMENTATIONS, Augmentation
from secateur.data.memory import free_memory, neighbours
from secateur.data.share import holding, share_of
from secateur.track.local import Log, read
from secateur.train.devices import ALONE, Team, TeamError, joined
from test_pipeline import assert_same_run

ROOT = Path(__file__).parent.parent
LIMIT = 150.0  # seconds until a test says that processes hang
RECIPE = """
version: 1
name: team
device: cpu
threads: 1
data: {limit: 231, augment: crop}
model: {name: "tests.together:normed"}
train: {epochs: 2, optimizer: sgd, lr: 0.01, batch_size: 33}
prune: {criterion: {name: fisher, samples: 100}, budget: {units: 0.5}, schedule: {steps: 2}, stop_drop: 0.9}
recover: {name: rewind}
measure: {repeats: 1, batch_sizes: [1]}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(*words: object, nodes: int = 1, each: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """Run ``torchrun ... words``, one for each emulated machine; none is left behind."""
    port = str(free_port())
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    own = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node-rank", str(node),
                "--nproc-per-node", str(each), "--master-addr", "127.0.0.1", "--master-port", port, *map(str, words),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for node in range(nodes)
    ]  # fmt: skip
    try:
        yield own
    finally:
        for process in own:
            if process.poll() is None:
                process.terminate()  # torchrun ends its processes, too
                process.wait(60)


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Exit codes and all that was said."""
    said = [process.communicate(timeout=LIMIT) for process in processes]
    return [process.returncode for process in processes], "".join(out + err for out, err in said)


def torchrun(*words: object, nodes: int = 1, each: int = 2) -> tuple[list[int], str]:
    with started(*words, nodes=nodes, each=each) as processes:
        return ended(processes)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    codes, said = torchrun(ROOT / "tests" / "together.py", tmp_path)
    assert codes == [0], said
    tensors, alone = together.everything(ALONE)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    both = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert [report["size"] for report in told] == [2, 2]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    for name, mine in tensors.items():
        case, theirs = name.split("/")[0], both[0][name]
        allowed = {"score plain": 1e-6, "score normed": 1e-6, "half": 1e-2}.get(case, 1e-4)
        assert (mine.double() - theirs.double()).abs().max() <= allowed, name
    for report in told:
        assert json.dumps(report["figures"]) == json.dumps(told[0]["figures"])
    for case in together.CASES:
        for mine, theirs in zip(alone[case], told[0]["figures"][case], strict=True):
            losses = [abs(mine[key] - theirs[key]) for key in ("train_loss", "validation_loss")]
            allowed = {"half": 5e-3}.get(case, 1e-5)  # bfloat16 rounds at 4e-3
            assert max(losses) <= allowed, (case, losses)
    for key in ("plain plan", "normed plan"):
        assert alone[key] == told[0]["figures"][key]
    for report in told:
        assert report["copied"] == [5000, False]
        assert not [name for name in report["left"] if "gloo" in name]  # threads that could abort an ending process
        assert report["grads"] == [[3.0, 3.0], [1.0, 1.0], None]
        assert report["told"][0].startswith("TeamError: the number is not the same in all 2 processes")
    assert [report["told"][1] for report in told] == [
        "ZeroDivisionError: division by zero",
        "TeamError: process 0 stopped: division by zero",
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def two_nodes(path: Path) -> tuple[Path, str]:
    """A run on two emulated machines with one process each."""
    folder = path.parent / "nodes"
    codes, said = torchrun("-m", "secateur", "run", path, "--out", folder, nodes=2, each=1)
    assert codes == [0, 0], said
    return folder, said


def epochs(folder: Path) -> list[list[float]]:
    rows = [record.data for record in read(folder / "records.jsonl") if record.stage == "epoch"]
    return [[row["train_loss"], row["validation_loss"], row["train_accuracy"]] for row in rows]


def test_a_run_on_two_machines_is_that_of_one_process(path: Path, two_nodes: tuple[Path, str]) -> None:
    folder, said = two_nodes
    assert said.count("report: ") == said.count("run folder: ") == 1  # one process tells
    alone = pipeline.run(recipe.load(path, [f"out={path.parent / 'alone'}"]))
    assert (alone / "plan.json").read_text() == (folder / "plan.json").read_text()
    ours, theirs = torch.tensor(epochs(alone)), torch.tensor(epochs(folder))
    assert len(ours) == 4
    assert (ours - theirs).abs().max() <= 1e-5
    assert {file.name for file in alone.iterdir()} == {file.name for file in folder.iterdir()}
    first = next(record.data for record in read(folder / "records.jsonl"))
    assert first["processes"] == 2


@pytest.mark.slow
def test_sigterm_stops_all_and_resume_ends_in_the_same_bits(path: Path, two_nodes: tuple[Path, str]) -> None:
    folder = path.parent / "stopped"
    words = ("-m", "secateur", "run", path, "--out", folder)
    with started(*words) as processes:
        begin = time.monotonic()
        while not (folder / "plans" / "step_1.json").exists():  # in the midst of the work of both
            assert processes[0].poll() is None, ended(processes)
            assert time.monotonic() - begin < LIMIT
            time.sleep(0.05)
        processes[0].send_signal(signal.SIGTERM)
        codes, said = ended(processes)
    assert codes != [0]
    assert said.count("error: interrupted. Continue with: torchrun") == 1, said
    assert "error: process" not in said
    assert not (folder / "pruned.safetensors").exists()
    codes, said = torchrun(*words, "--resume")
    assert codes == [0], said
    assert "resuming at stage" in said
    assert_same_run(two_nodes[0], folder)


def test_processes_that_choose_other_plans_all_stop(path: Path, tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text(
        "import os\nfrom secateur import Budget, cli, cutting\nchoose = cutting.choose\n"
        "def other(scores, budget, *args, **options):\n"
        "    return choose(scores, Budget(units=0.9) if os.environ['RANK'] == '1' else budget, *args, **options)\n"
        "cutting.choose = other\ncli.main()\n"
    )
    words = ("run", path, "train.epochs=1", "recover.name=finetune", "--out", tmp_path / "out")
    begin = time.monotonic()
    codes, said = torchrun(script, *words)
    assert codes == [1], said
    assert "error: the plan of cut 1 is not the same in all 2 processes: process 0 has the hash" in said
    assert "Traceback (most recent call last):\n  File \"" + str(script) not in said
    assert time.monotonic() - begin < LIMIT / 2
    assert not (tmp_path / "out" / "plans").exists()


@pytest.mark.parametrize("name", [name for name, step in AUGMENTATIONS.items() if step])
def test_shares_of_a_batch_are_augmented_as_the_whole(name: str) -> None:
    augment, images = AUGMENTATIONS[name], torch.rand(7, 3, 8, 8)
    assert augment is not None

    def drawn(augment: Augmentation, rows: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return augment(rows)

    whole, parts = drawn(augment, images), []
    for rank in range(3):
        share = share_of(7, rank, 3)
        with holding(share):
            parts.append(drawn(augment, images[share.begin : share.end]))
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


@pytest.mark.parametrize(("total", "size"), [(1, 4), (5, 2), (8, 3), (3, 3)])
def test_shares_cover_a_batch_once_and_no_process_is_without_an_image(total: int, size: int) -> None:
    shares = [share_of(total, rank, size) for rank in range(size)]
    assert sum(share.count for share in shares) == total
    rows = [row for share in shares if share.real for row in range(share.begin, share.end)]
    assert rows == list(range(total))
    assert all(0 <= share.begin < share.end <= total for share in shares)
    assert sum(share.weight for share in shares) == pytest.approx(1)


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TeamError, match=r"WORLD_SIZE is 3, but RANK, .* missing; start with `torchrun"), joined():
        pass
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(TeamError, match="one device each; use cuda or auto"), joined(torch.device("cuda:1")):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TeamError, match="there are 1; start 1 processes"), joined(torch.device("cuda")):
        pass


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as team:
        assert team == Team() == ALONE
        assert (team.lead, team.several, team.decided(lambda: "text")) == (True, False, "text")


def test_processes_of_a_machine_divide_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert neighbours() == 1
    whole = free_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory() < whole / 2


def test_a_mute_log_counts_and_writes_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path / "records.jsonl", 3, mute=True)
    log.append("a", b=1)
    assert log.count == 4
    assert list(tmp_path.iterdir()) == []

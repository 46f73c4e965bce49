"""The revision that a run records: of the folder where its recipe is, with git, without it, outside of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from secateur.track.git import revision

NAMES = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *words: str) -> str:
    env = {**os.environ, **NAMES, "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(["git", "-C", str(folder), *words], check=True, env=env, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "recipe.yaml").write_text("version: 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "x")
    (folder / "runs").mkdir()
    return folder


def test_dirty_says_whether_tracked_files_differ(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert revision(tmp_path) is None
    assert revision(tmp_path / "nowhere") is None
    (repository / "runs" / "new").write_text("runs beside the recipe change nothing")
    assert revision(repository / "runs") == {"commit": commit, "dirty": False}
    (repository / "recipe.yaml").write_text("version: 2\n")
    assert revision(repository) == {"commit": commit, "dirty": True}


def test_a_hook_around_the_run_does_not_decide(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert revision(repository) == {"commit": git_head(repository), "dirty": False}


def git_head(folder: Path) -> str:
    return (folder / ".git" / "refs" / "heads" / "main").read_text().strip()


@pytest.mark.parametrize("state", ["loose", "packed", "detached", "worktree", "empty"])
def test_without_git_the_commit_is_read_from_the_files(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    commit: str | None = git(repository, "rev-parse", "HEAD")
    place = repository
    if state == "packed":
        git(repository, "pack-refs", "--all")
    elif state == "detached":
        git(repository, "checkout", "-q", "--detach")
    elif state == "worktree":
        place = tmp_path / "beside"
        git(repository, "worktree", "add", "-q", "-b", "other", str(place))
    elif state == "empty":
        place = tmp_path / "empty"
        place.mkdir()
        git(place, "init", "-q")
        commit = None
    monkeypatch.setenv("PATH", "")
    assert revision(place) == (None if commit is None else {"commit": commit, "dirty": None})

"""Runs that share a dense training: trained once, and every run ends as if it had trained alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secateur.pipeline import run
from secateur.recipe import loads
from secateur.session import Screen
from secateur.sharing import training_hash
from secateur.track.local import read
from secateur.types import CheckpointError

TINY = """
version: 1
name: tiny
device: cpu
data: {limit: 200}
train: {epochs: 2, lr: 0.003}
prune: {criterion: {samples: 64}}
recover: {epochs: 1}
measure: {repeats: 1, batch_sizes: [1]}
"""


@pytest.mark.parametrize(
    "options", [["recover.name=rewind"], ["recover.carry_optimizer=true"], ["recover.name=distil"]]
)
def test_a_run_that_takes_a_training_ends_as_one_that_trains(tmp_path: Path, options: list[str]) -> None:
    first = loads(TINY, "here", [*options, "prune.criterion.name=magnitude"])
    second = loads(TINY, "here", options)
    run(first, tmp_path / "first", shared=tmp_path / "shared")
    said: list[str] = []
    run(second, tmp_path / "second", shared=tmp_path / "shared", screen=Screen(line=said.append))
    run(second, tmp_path / "alone")
    assert any("trained by another run" in line for line in said)
    for name in ("dense", "pruned"):
        alone, taken = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("alone", "second"))
        assert alone.keys() == taken.keys()
        assert all(torch.equal(alone[key], taken[key]) for key in alone)
    rows = [r for r in read(tmp_path / "second" / "records.jsonl") if r.stage in ("epoch", "dense")]
    assert [r.stage for r in rows].count("epoch") == 3
    assert {r.data.get("shared") for r in rows if r.data.get("step", 0) == 0} == {training_hash(second)}
    kept = read(tmp_path / "alone" / "records.jsonl")
    assert [r.stage for r in kept] == [r.stage for r in read(tmp_path / "second" / "records.jsonl")]


def test_what_decides_about_the_training_sets_it_apart() -> None:
    base = training_hash(loads(TINY))
    for same in (
        "name=other",
        "prune.budget={macs: 0.3}",
        "recover.epochs=2",
        "measure.repeats=2",
        "out=x",
        "fbs.epochs=2",
        "rnp.rounds=2",
    ):
        assert training_hash(loads(TINY, overrides=[same])) == base
    for other in ("seed=1", "data.limit=100", "train.lr=0.1", "recover.name=rewind", "recover.carry_optimizer=true"):
        assert training_hash(loads(TINY, overrides=[other])) != base


def test_a_damaged_training_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    recipe = loads(TINY)
    run(recipe, tmp_path / "first", shared=tmp_path / "shared")
    (place,) = (tmp_path / "shared").glob("*.safetensors")
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"shared training .* cannot be used .*; remove it"):
        run(recipe, tmp_path / "second", shared=tmp_path / "shared")
    place.unlink()
    run(recipe, tmp_path / "second", shared=tmp_path / "shared", resume=True)
    assert (tmp_path / "second" / "pruned.safetensors").exists()

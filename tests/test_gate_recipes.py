"""The shipped recipes with gates run for two steps, with small networks in place of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packed import write_packed
from pictures import write_folder
from secateur import pipeline
from secateur.recipe import load
from secateur.track.local import read

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for kind in ("fbs", "rnp") for path in (ROOT / "recipes").glob(f"{kind}_*.yaml"))
SMALL = {
    "cifarnet": "{name: cifarnet, args: {widths: [4, 4, 4, 4, 4, 4, 4, 4]}}",
    "s0": "{name: s0, args: {widths: [4, 4, 4, 4], dropout: 0.0}}",
    "torchvision:vgg16_bn": "{name: vgg, args: {depth: 11, width: 0.125}}",
    "torchvision:resnet18": "{name: resnet20, args: {width: 4}}",
}


def test_there_are_recipes_for_all_networks() -> None:
    assert [path.stem for path in RECIPES] == [
        "fbs_cifar10", "fbs_cifarnet_cifar10", "fbs_resnet18_imagenet", "fbs_vgg16_imagenet",
        "rnp_cifar10", "rnp_s0_cifar10", "rnp_vgg16_imagenet",
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_with_gates_runs_for_two_steps(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    if recipe.data.name == "imagefolder":
        write_folder(tmp_path, {"train": 8, "val": 2})
        more = ["data.image_size=32", "data.validation=0.2", "model.checkpoint=null", "train.epochs=1"]
    else:
        write_packed(tmp_path / recipe.data.name, size=32, mode="RGB", classes=10)
        more = ["train.epochs=1", "data.limit=40"]
    more += [f"fbs.{key}" for key in ("epochs=1", "densities=[1.0, 0.5]")] if recipe.fbs else []
    more += [f"rnp.{key}" for key in ("rounds=1", "policy_steps=2", "backbone_steps=2")] if recipe.rnp else []
    more += ["rnp.budgets=[1.0]"] if recipe.rnp else []
    folder = pipeline.run(load(path, [
        f"data.root={json.dumps(str(tmp_path))}", f"out={json.dumps(str(tmp_path / 'out'))}", "device=cpu", "threads=1",
        f"model={SMALL[recipe.model.name]}", "train.batch_size=8", "measure={batch_sizes: [1], repeats: 1}", *more,
    ]))  # fmt: skip
    stages = [record.stage for record in read(folder / "records.jsonl")]
    assert stages.count("gated") == (2 if recipe.fbs else 1)
    assert (folder / "gated.safetensors").exists()

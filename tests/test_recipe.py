"""Recipes: strict, every problem named with its place; the shipped ones run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packed import write_packed
from secateur import pipeline
from secateur.criteria import Random
from secateur.data import SOURCES
from secateur.models import MODELS
from secateur.recipe import Recipe, json_schema, load, loads
from secateur.schedules import SCHEDULES
from secateur.sections import Train, When
from secateur.starter import starter
from secateur.track.local import read
from secateur.train.optimizers import OPTIMIZERS
from secateur.train.rates import RATES
from secateur.types import RecipeError

ROOT = Path(__file__).parent.parent
OWN = ("fbs_", "rnp_", "s2a_", "s4_")  # have tests of their own
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.yaml") if not p.stem.startswith(OWN))
GOOD = "version: 1\nname: x\nprune:\n  budget: {units: 0.5}\n"


def message(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.yaml", overrides)
    return str(caught.value)


def test_all_problems_are_listed_in_the_order_of_the_file() -> None:
    text = (
        "version: 1\nname: a\ntrain:\n  lrr: 3\n  lr: -1\n  optimizer: adm\n"
        "prune:\n  round_to: 1.5\n  criterion: {name: tailor}\ndata: {name: digit}\nprunes: 3\n"
    )
    assert message(text).split("\n  ") == [
        "the recipe r.yaml has 7 problems:",
        "r.yaml:4:3: train.lrr = 3: unknown key; did you mean 'lr'?",
        "r.yaml:5:3: train.lr = -1: must be greater than 0.",
        "r.yaml:6:3: train.optimizer = 'adm': must be 'adam', 'adamw', 'rmsprop' or 'sgd'; did you mean 'adam'?",
        "r.yaml:8:3: prune.round_to = 1.5: must be 'auto' or must be a valid integer.",
        "r.yaml:9:15: prune.criterion.name = 'tailor': must be one of bn_scale, contribution, fisher, "
        "magnitude, random, taylor; did you mean 'taylor'?",
        "r.yaml:10:8: data.name = 'digit': must be one of celeba, cifar10, cifar100, digits, fashion_mnist, "
        "imagefolder, mnist, hf:NAME_OR_FOLDER, celeba:ATTRIBUTE; did you mean 'digits'?",
        "r.yaml:11:1: prunes = 3: unknown key; did you mean 'prune'?",
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "found nothing"),
        ("- a", "found list"),
        ("name: x", "version: this key is required"),
        ("version: 2\nname: x", "r.yaml:1:1: version = 2: must be 1"),
        ("version: 1\nname: 3", "name = 3: must be a valid string"),
        ("version: 1\nname: ../x", "name = '../x'"),
        ("version: 1\nname: x\nseed: true", "seed = True: must be a valid integer"),
        ("version: 1\nname: x\ntrain: {epochs: '3'}", "train.epochs = '3': must be a valid integer"),
        ("version: 1\nname: x\ntrain: {lr: .nan}", "train.lr = nan"),
        ("version: 1\nname: x\ntrain: 5", "train = 5"),
        (
            "version: 1\nname: x\nprune: {budget: {units: 0}}",
            "prune.budget.units = 0: must be greater than 0",
        ),
        (
            "version: 1\nname: x\nprune: {budget: {units: 0.5, macs: 0.5}}",
            "exactly one of units, params, macs",
        ),
        ("version: 1\nname: x\nprune: {budget: {}}", "found none"),
        (
            "version: 1\nname: x\nprune: {criterion: {args: {frm: 1}}}",
            "unknown option of taylor; did you mean 'form'?",
        ),
        ("version: 1\nname: x\nprune: {criterion: {args: {form: papr}}}", "paper, elementwise"),
        ("version: 1\nname: x\nmodel: {name: resnet-20}", "did you mean 'resnet20'?"),
        ("version: 1\nname: x\nmeasure: {batch_sizes: [1, x]}", "measure.batch_sizes.1 = 'x'"),
        (
            "version: 1\nname: x\ntrain: {epochs: 3, warmup: 3}",
            "r.yaml:3:20: train.warmup = 3: must be less than train",
        ),
        ("version: 1\nname: x\nrecover: {epochs: 2, warmup: 2}", "less than the shortest recovery, 2 epochs"),
        ("a: 1\na: 2", "r.yaml:2:1: this is not valid YAML: found duplicate key"),
        ("a: [", "r.yaml:1:5: this is not valid YAML"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("x: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("[" * 5000, "nested too deeply"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_mistake_has_a_message_of_its_own(text: str, part: str) -> None:
    assert part in message(text)


def test_the_words_of_the_schema_are_those_of_the_registries() -> None:
    fields = Train.model_fields
    assert set(get_args(fields["rate"].annotation)) == set(RATES)
    assert set(get_args(fields["optimizer"].annotation)) == set(OPTIMIZERS)
    assert set(get_args(When.model_fields["name"].annotation)) == set(SCHEDULES)


def test_overrides_are_yaml_and_their_place_is_the_command_line() -> None:
    recipe = loads(GOOD, overrides=["train.lr=1e-2", "prune.budget={macs: 0.25}", "prune.freeze=[a, 'b.*']"])
    assert (recipe.train.lr, recipe.budget.kind, recipe.budget.keep) == (0.01, "macs", 0.25)
    assert recipe.prune.freeze == ("a", "b.*")
    assert "command line: train.lr = 'x'" in message(GOOD, "train.lr=x")
    assert "command line: tain = {'lr': 3}: unknown key; did you mean 'train'?" in message(GOOD, "tain.lr=3")
    assert "prune.budget={macs: 0.5}" in message(GOOD, "prune.budget.macs=0.5")
    assert "key=value" in message(GOOD, "train.lr")
    assert "no keys inside" in message(GOOD, "name.first=3")


def test_numbers_are_yaml_1_2() -> None:
    assert loads(GOOD, overrides=["train.lr=1e-3"]).train.lr == 0.001
    assert loads("version: 1\nname: on").name == "on"


def test_the_hash_is_of_the_values_but_not_of_the_folder() -> None:
    base = loads(GOOD)
    assert base.hash == loads(GOOD + "seed: 0\nout: elsewhere\n").hash == loads("\n# hello\n" + GOOD).hash
    assert base.hash != loads(GOOD, overrides=["seed=1"]).hash


def test_recipes_are_values() -> None:
    with pytest.raises(ValueError, match="frozen"):
        loads(GOOD).seed = 3  # pyrefly: ignore


def test_the_starter_says_every_default() -> None:
    recipe = loads(starter("recipe.yaml"))
    assert recipe == Recipe(version=1, name="first")
    keys = [line.split(":")[0].strip() for line in starter("x").splitlines() if not line.startswith("#")]
    assert {"criterion", "round_to", "final_epochs", "batch_sizes", "label_smoothing"} <= set(keys)


def test_the_page_about_recipes_shows_every_key() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert starter("recipe.yaml") in page
    for part in (*SOURCES, *MODELS, *SCHEDULES):
        assert f"`{part}`" in page


def test_the_schema_in_docs_is_that_of_the_code() -> None:
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == json_schema()
    assert json_schema()["$defs"]["Score"]["properties"]["name"]["enum"].count("taylor") == 1


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "bytes.yaml")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_recipes_give_a_recipe_or_a_clear_error(data: st.DataObject) -> None:
    text = RECIPES[0].read_text()
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 12))
        text = text[:at] + data.draw(st.text(max_size=6)) + text[at + length :]
    with contextlib.suppress(RecipeError):
        loads(text)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_runs_for_two_steps(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    overrides = [
        f"out={json.dumps(str(tmp_path / 'out'))}", "device=cpu", "threads=1",
        "train.epochs=1", "data.limit=40",
        "recover={name: finetune, epochs: 1}", "measure={batch_sizes: [1], repeats: 1}",
        "prune.schedule={name: iterative, steps: 2}", "prune.criterion.samples=32",
    ]  # fmt: skip
    if recipe.model.name == "vae":  # 85 million parameters
        overrides += ["data.image_size=16", "model.args={widths: [32, 48], channels: [4, 8], latent: 6}"]
    ordinary = ["prune.budget={units: 0.5}"] if recipe.prune.schedule.training else []
    if recipe.data.root is not None:
        name = recipe.data.name
        size, mode = (28, "L") if name.endswith("mnist") else (32, "RGB")
        write_packed(tmp_path / name, size=size, mode=mode, classes=2 if name == "celeba" else 10)
        overrides.append(f"data.root={json.dumps(str(tmp_path))}")
    recipe = load(path, [*overrides, *ordinary])
    folder = pipeline.run(recipe)
    cuts = [record.data for record in read(folder / "records.jsonl") if record.stage == "cut"]
    kind, asked = recipe.budget.kind, recipe.budget.keep
    assert len(cuts) == 2
    assert cuts[-1]["achieved"][kind] == pytest.approx(asked, abs=0.02)
    assert "<svg" in (folder / "report.html").read_text()


def test_the_random_control_draws_by_the_seed_of_the_recipe() -> None:
    from secateur import resolve

    words = ["prune.criterion.name=random"]
    text = "{version: 1, name: a, seed: 5}"
    assert resolve.criterion(loads(text, overrides=words)) == Random(seed=5)
    assert resolve.criterion(loads(text, overrides=[*words, "prune.criterion.args={seed: 2}"])) == Random(seed=2)

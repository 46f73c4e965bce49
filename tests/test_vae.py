"""Autoencoders from recipe to report: the ELBO, units of the code that go, pictures, and what is refused."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributions import Normal, kl_divergence
from typer.testing import CliRunner

import secateur as sc
from secateur import pipeline, resolve
from secateur.cli import app
from secateur.compare import compare
from secateur.criteria import REGISTRY
from secateur.cutting import allocate
from secateur.infer import evaluate as measured_again
from secateur.infer import open_model
from secateur.measure.elbo import NOISE, RECONSTRUCTION, activity
from secateur.measure.task import evaluate
from secateur.models.build import build
from secateur.models.vae import VAE, small_vae
from secateur.recipe import Recipe, load, loads
from secateur.report import render
from secateur.report.compared import table
from secateur.session import limited
from secateur.track.local import Log, read
from secateur.track.values import metrics
from secateur.train.loop import TrainError
from secateur.types import Budget, Plan, RecipeError

ROOT = Path(__file__).parent.parent
TINY = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 120}
model: {name: small_vae, args: {widths: [24], channels: [4, 8], latent: 4}}
train: {epochs: 2, lr: 0.003, precision: float32}
prune: {criterion: {name: contribution, samples: 60}, budget: {units: 0.6}, schedule: {steps: 2}, round_to: null}
recover: {epochs: 1}
measure: {repeats: 1, batch_sizes: [1]}
"""


def tiny(folder: Path, *overrides: str) -> Recipe:
    return loads(TINY, overrides=[f"out={json.dumps(str(folder))}", *overrides])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return functools.cache(lambda *words: pipeline.run(tiny(tmp_path_factory.mktemp("vae") / "out", *words)))


@pytest.fixture
def trained() -> VAE:
    """A network whose code has said something once: large weights instead of a training."""
    torch.manual_seed(0)
    model = small_vae(1, 8, [4, 8], [24], 4)
    for p in (model.mean.weight, model.log_variance.weight):
        nn.init.normal_(p, std=5)
    return model.eval()


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.rand(5 + k, 1, 8, 8), torch.zeros(5 + k, dtype=torch.long)) for k in range(count)]


# The ELBO


@torch.no_grad()
def test_the_elbo_is_that_of_one_image_and_one_pixel_at_a_time(trained: VAE) -> None:
    found = evaluate(trained, batches())
    rows = []
    for number, (inputs, _) in enumerate(batches()):
        mean, log_variance = trained.encode(inputs)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(NOISE + number))
        scale = (log_variance / 2).exp()
        images = trained.decode(mean + scale * noise)
        for k, image in enumerate(inputs):
            x, p = image.flatten().double(), images[k].flatten().double()
            spent = -sum(float(a * b.log() + (1 - a) * (1 - b).log()) for a, b in zip(x, p, strict=True))
            pairs = zip(mean[k], scale[k], strict=True)
            kl = sum(float(kl_divergence(Normal(m, s), Normal(0.0, 1.0))) for m, s in pairs)
            rows.append((spent + kl, spent, kl))
    values = torch.tensor(rows)
    assert (found.loss, found.reconstruction, found.kl) == pytest.approx(tuple(values.mean(0).tolist()), rel=1e-5)
    assert found.spreads == pytest.approx(tuple(values.std(0, correction=0).tolist()), rel=1e-3)
    row = found.measurements("cpu", "test")[0]
    assert (row.name, row.value, row.unit, row.n) == ("test elbo", -found.loss, "nats", 18)


def test_measuring_draws_the_same_codes_and_leaves_the_random_state(trained: VAE) -> None:
    shown, trained = batches(), trained.train()
    state = torch.get_rng_state()
    whole = evaluate(trained, shown)
    assert torch.equal(torch.get_rng_state(), state)
    assert trained.training
    torch.manual_seed(5)
    assert evaluate(trained, batches()) == whole
    rows: dict[int, torch.Tensor] = {}

    def kept(mine: list[int], found: list[torch.Tensor]) -> list[torch.Tensor]:
        rows.update(zip(mine, found, strict=True))
        return found

    for mine in ([0, 2], [1]):  # what two processes measure
        evaluate(trained, [batches()[k] for k in mine], functools.partial(kept, mine), mine)
    assert RECONSTRUCTION.quality([rows[k] for k in range(3)]) == whole
    with torch.no_grad():
        assert not torch.equal(RECONSTRUCTION.row(trained.eval(), batches()[0], 1), rows[0])  # other noise per batch


def test_the_training_loss_is_minus_the_elbo_of_the_code_that_was_drawn(trained: VAE) -> None:
    inputs, labels = batches(1)[0]
    torch.manual_seed(3)
    output = trained.train()(inputs)
    loss, parts = RECONSTRUCTION.learn(output, inputs, labels, labels, 0.0)
    want = F.binary_cross_entropy(output.images, inputs, reduction="sum") + output.kl.sum()
    assert loss.item() == pytest.approx(want.item() / 5, rel=1e-6)
    assert parts.sum().item() == pytest.approx(want.item(), rel=1e-6)
    assert parts[1] == pytest.approx(float(output.kl.detach().sum()), rel=1e-6)
    assert loss.requires_grad
    assert not parts.requires_grad


def test_pixels_are_float32_under_bfloat16() -> None:
    """In bfloat16 1 / (1 + exp(-7)) is 1, and grey pixels there cost up to 100 nats without a slope."""
    model = small_vae(1, 8, [4, 8], [24], 4)
    nn.init.constant_(model.decoder[-2].bias, 9.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.rand(3, 1, 8, 8))
    assert out.images.dtype == out.kl.dtype == torch.float32
    assert out.images.max() < 1


# Units of the code


def test_units_of_the_code_are_one_exact_group(trained: VAE) -> None:
    graph = sc.trace(trained, batches(1)[0][0])
    code = graph.group("mean")
    members = {(m.tensor, m.role, m.axis) for m in code.members}
    assert members == {("mean.weight", "out", 0), ("log_variance.weight", "out", 0), ("decoder.0.weight", "in", 1)}
    assert code.prunable
    assert code.exact
    small = sc.compact(graph, Plan(graph.fingerprint, (("mean", 4, (0, 3)),)))
    x = torch.rand(7, 1, 8, 8)
    mean, kept = trained.encode(x)[0], small.encode(x)[0]
    torch.testing.assert_close(kept, mean[:, [0, 3]])
    torch.testing.assert_close(activity(small, x), activity(trained, x)[[0, 3]])
    assert not torch.isclose(small(x).kl, trained(x).kl).any()


def silenced(model: VAE, unit: int) -> VAE:
    """Make a unit of the code one that has collapsed: always the prior, and next to no weight in the decoder."""
    with torch.no_grad():
        model.mean.weight[unit] = 0
        model.log_variance.weight[unit] = 0
        model.decoder[0].weight[:, unit] *= 1e-3
    return model


@pytest.mark.parametrize("name", ["contribution", "fisher", "taylor"])
def test_an_inactive_unit_is_found_and_goes_first(name: str, trained: VAE) -> None:
    model = silenced(trained, 2)
    x = batches(1)[0][0]
    assert [k for k, kl in enumerate(activity(model, x)) if kl < 0.01] == [2]
    graph = sc.trace(model, x)
    chosen = REGISTRY[name]()
    scores = sc.score(graph, chosen, batches(), loss=RECONSTRUCTION.scoring())
    assert int(scores.values["mean"].argmin()) == 2
    assert scores.values["mean"][2] < 0.1 * scores.values["mean"].median()
    again = sc.score(graph, chosen, batches(), loss=RECONSTRUCTION.scoring())
    assert all(torch.equal(scores.values[key], again.values[key]) for key in scores.values)


def test_both_consumers_of_the_last_hidden_layer_count(trained: VAE) -> None:
    """What a unit adds to mean and log variance: the mean of its shares over the outputs of both."""
    graph = sc.trace(trained, batches(1)[0][0])
    values = sc.score(
        graph, REGISTRY["contribution"](lambda1=1, lambda2=0), batches(), loss=RECONSTRUCTION.scoring()
    ).values
    a = torch.cat([trained.encoder(x) for x, _ in batches()]).detach()
    w = torch.cat([trained.mean.weight, trained.log_variance.weight]).detach().abs()
    shares = a[:, None] * w
    total = shares.sum(2, keepdim=True)
    want = torch.where(total > 0, shares / total, 0).mean((0, 1))
    torch.testing.assert_close(values["encoder.5"], want, rtol=1e-4, atol=1e-7)


@functools.cache
def of_85_million() -> VAE:
    torch.manual_seed(0)
    return build("vae")


@pytest.mark.parametrize("name", ["contribution", "random"])
def test_acceptance_23_the_autoencoder_of_85_million_shrinks_by_tenths(name: str) -> None:
    """Three events of the shipped recipe, on one image; after each the network reconstructs."""
    recipe = load(ROOT / "recipes" / "s1_vae_celeba.yaml", [f"prune.criterion.name={name}", "prune.criterion.args={}"])
    model, x = of_85_million(), torch.rand(1, 3, 64, 64)
    assert sum(p.numel() for p in model.parameters()) == 85_183_619
    dense = None
    for event, size in enumerate((75_152_559, 66_392_355, 58_761_335)):
        graph = limited(sc.trace(model, x), recipe.prune.only)
        dense = dense or graph
        criterion = resolve.criterion(recipe, event)
        if name == "contribution":
            criterion = replace(criterion, lambda2=0)
        scores = sc.score(graph, criterion, [(x, torch.zeros(1))], loss=RECONSTRUCTION.scoring())
        plan = allocate(recipe, dense, scores, Budget(units=1))
        assert len(plan.keep) == 4
        model = sc.compact(graph, plan, verify=False)
        assert sum(p.numel() for p in model.parameters()) == size
        with torch.no_grad():
            out = model.eval()(x)
        assert out.images.shape == x.shape
        assert float(out.kl) > 0


# Runs


def test_a_run_tracks_loss_reconstruction_and_kl(runs: Callable[..., Path]) -> None:
    folder = runs()
    records = read(folder / "records.jsonl")
    epochs = [r.data for r in records if r.stage == "epoch"]
    assert len(epochs) == 4
    for row in epochs:
        for part in ("train", "validation"):
            both = row[f"{part}_reconstruction"] + row[f"{part}_kl"]
            assert row[f"{part}_loss"] == pytest.approx(both, rel=1e-6)
            assert row[f"{part}_kl"] > 0
        assert "train_accuracy" not in row
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    cuts = [r.data for r in records if r.stage == "cut"]
    assert all(cut["after"]["n"] == cut["before"]["n"] > 0 for cut in cuts)
    assert "mean" in {group["name"] for cut in cuts for group in cut["groups"]} or cuts[-1]["achieved"]["units"] <= 0.61
    names = {row.name for row in metrics(records)}
    assert {"train_kl", "validation_reconstruction", "cut/after_kl", "pruned/test_elbo"} <= names
    told = next(r.data for r in records if r.stage == "measure")["measurements"]
    for name in ("dense", "pruned"):
        quality, _ = measured_again(open_model(folder / f"{name}.safetensors"))
        value = {m["name"]: m["value"] for m in told[name]}
        assert value["test elbo"] == pytest.approx(-quality.loss, rel=1e-6)
        assert value["test elbo"] == pytest.approx(-value["test reconstruction"] - value["test kl"], rel=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        ["prune.criterion={name: random}"],
        ["prune.criterion={name: fisher, evidence: training}"],
        ["prune.criterion.name=taylor", "prune.criterion.args={}", "train.precision=bfloat16", "train.ema=0.9"],
        ["prune.criterion={name: magnitude}", "recover={name: scratch, final_epochs: 1}"],
        ["prune.schedule={name: during, total_epochs: 3, initial_iterations: 1, increment: 1, keep: 0.8}",
         "train={lr: 0.003}", "recover={}", "prune.budget=null", "prune.round_to=null"],
        ["prune.schedule={name: every, units: 8}", "recover.steps=2", "prune.save_every=1", "prune.budget.units=0.8",
         "prune.criterion={name: fisher, samples: 40}"],
        ["prune.granularity=kernel", "prune.criterion={name: magnitude}", "prune.budget={params: 0.6}",
         "prune.schedule={name: once}"],
        ["prune.stop_drop=0.000001", "recover={name: none}", "train.epochs=6", "prune.budget.units=0.2"],
    ],
    ids=lambda words: words[0].split("=", 1)[1],
)  # fmt: skip
def test_every_way_to_prune_takes_an_autoencoder(words: list[str], runs: Callable[..., Path]) -> None:
    if any(word.startswith("prune.schedule={name: during") for word in words):
        text = TINY.replace(", budget: {units: 0.6}, schedule: {steps: 2}, round_to: null", "")
        text = text.replace("epochs: 2, ", "").replace("recover: {epochs: 1}\n", "")
        folder = runs("name=x").with_name("during")
        recipe = loads(text, overrides=[words[0], f"out={json.dumps(str(folder))}"])
        folder = pipeline.run(recipe)
    else:
        folder = runs(*words)
    stages = [r.stage for r in read(folder / "records.jsonl")]
    assert stages[-1] == "end"
    assert ("stopped" in stages) is ("prune.stop_drop=0.000001" in words)
    assert stages.count("picture") == 2
    assert "ELBO" in (folder / "report.html").read_text()


class Stop(KeyboardInterrupt):
    """Stands for a kill."""


@pytest.mark.parametrize("at", [2, 4])
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    at: int, runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, count = Log.append, 0

    def stopping(self: Log, stage: str, **data: object) -> object:
        nonlocal count
        count += stage in ("epoch", "cut")
        if count == at:
            raise Stop
        return append(self, stage, **data)

    recipe = tiny(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", stopping)
        with pytest.raises(Stop):
            pipeline.run(recipe)
    torch.manual_seed(99)
    folder = pipeline.run(recipe, resume=True)
    for name in ("dense.safetensors", "pruned.safetensors", "pictures/samples.png"):
        assert (folder / name).read_bytes() == (runs() / name).read_bytes()


def test_the_report_shows_pictures_and_the_code(runs: Callable[..., Path]) -> None:
    folder = runs()
    records = read(folder / "records.jsonl")
    page = (folder / "report.html").read_text()
    assert page == render([record for record in records if record.stage != "end"])  # of the records alone
    shown = re.findall(r'src="([^"]*)"', page)
    assert len(shown) == 2
    for name, source in zip(("reconstructions", "samples"), shown, strict=True):
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert data == (folder / "pictures" / f"{name}.png").read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == {"reconstructions": (78, 28), "samples": (78, 38)}[name]
            assert len(image.getcolors(1000)) > 10
    assert page.count("<svg") == 3
    code = next(r.data for r in records if r.stage == "code")
    kept = next((row["kept"] for row in last_groups(records) if row["name"] == "mean"), 4)
    assert len(code["kl"]["dense"]) == len(code["kl"]["pruned"]) == 4
    assert sum(value is not None for value in code["kl"]["pruned"]) == kept
    assert page.count('<td class="num">removed</td>') == 4 - kept
    for text in ("-ELBO", "KL of each unit of the code", "test ELBO", "original, dense, pruned"):
        assert text in page


def last_groups(records: list) -> list[dict]:
    return [r.data for r in records if r.stage == "cut"][-1]["groups"]


def test_runs_are_compared_by_their_elbo(runs: Callable[..., Path], tmp_path: Path) -> None:
    random = runs("prune.criterion={name: random}")
    found = compare([runs(), random])
    assert found.accuracy == "test elbo"
    ours, control = (next(a for a in found.arms if a.role == role) for role in ("pruned", "random control"))
    gain = ours.values["test elbo"].mean - control.values["test elbo"].mean
    assert ours.gains["random control"].mean == pytest.approx(gain)
    text = table(found)
    assert "test ELBO [nats]" in text
    assert f"{ours.values['test elbo'].mean:,.2f}" in text
    assert "%" not in text
    page = CliRunner().invoke(app, ["compare", str(runs()), str(random), "--out", str(tmp_path / "c.html")])
    assert page.exit_code == 0, page.output
    assert "nats over random control" in (tmp_path / "c.html").read_text()


def test_a_loss_that_is_no_number_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="training loss is nan"):
        pipeline.run(tiny(tmp_path / "out", "train.lr=1e6", "train.optimizer=sgd"))


def test_evaluate_prints_nats(runs: Callable[..., Path]) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(runs() / "pruned.safetensors")])
    assert result.exit_code == 0, result.output
    assert re.search(r"test elbo +-\d+\.\d+ \+- \d+\.\d+ nats", result.stdout)


# What is refused


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data.normalize=true"], "data.normalize"),
        (["train.mixup=0.2"], "train.mixup"),
        (["train.label_smoothing=0.1"], "train.label_smoothing"),
        (["recover.name=distil"], "recover.name"),
        (["data.augment=flip_resized_crop_light"], "data.augment"),
    ],
)
def test_what_needs_classes_is_refused_with_its_line(words: list[str], key: str) -> None:
    with pytest.raises(RecipeError, match=f"command line: {key}"):
        loads(TINY, overrides=words)


def own_vae(in_channels: int = 1, images: int = 8) -> VAE:
    """A network of the user's own."""
    model = small_vae(in_channels, 8, [4, 8], [16], 3)
    if images != 8:
        model.decoder.append(nn.Upsample(size=images))
    return model


def test_networks_of_others_train_and_are_asked_when_they_are_built(tmp_path: Path) -> None:
    named = "model={name: 'test_vae:own_vae'}"
    folder = pipeline.run(tiny(tmp_path / "own", named, "prune.schedule.steps=1"))
    assert "test ELBO" in (folder / "report.html").read_text()
    with pytest.raises(RecipeError, match=r"train\.mixup"):
        pipeline.run(tiny(tmp_path / "a", named, "train.mixup=0.2"))
    with pytest.raises(RecipeError, match=r"they must be \(8, 1, 8, 8\)"):
        pipeline.run(tiny(tmp_path / "b", "model={name: 'test_vae:own_vae', args: {images: 16}}"))
    assert not (tmp_path / "a").exists()

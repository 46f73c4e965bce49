"""Models by name: the five forms, what they refuse, and how a model says where it came from."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import stored
from secateur.checkpoint import load, save
from secateur.models import MODELS
from secateur.models.build import ModelError, Spec, build, spec_of, trusted
from secateur.types import SecateurError

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}


class Plain(nn.Module):
    """A class that needs no arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Optional(nn.Module):
    """A class whose arguments, once given, are forgotten."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(2, width)


@pytest.mark.parametrize(
    ("spec", "kwargs", "kind"),
    [
        ("s3", {"classes": 3}, nn.Sequential),
        ("torchvision:resnet18", {"num_classes": 3}, torchvision.models.ResNet),
        ("torchvision:lraspp_mobilenet_v3_large", {}, torchvision.models.segmentation.LRASPP),
        (
            "torchvision:ssdlite320_mobilenet_v3_large",
            {"num_classes": 4},
            torchvision.models.detection.ssd.SSD,
        ),
        ("torchvision:r3d_18", {}, torchvision.models.video.VideoResNet),
        ("torchvision:googlenet", {}, torchvision.models.GoogLeNet),
        ("timm:convnext_atto", {"num_classes": 3}, nn.Module),
        ("timm:resnet18.a1_in1k", {}, nn.Module),
        ("transformers:BertModel", {"config": BERT, "add_pooling_layer": False}, transformers.BertModel),
        ("transformers:GPT2LMHeadModel", {"config": {**GPT2, "num_labels": 3}}, transformers.GPT2LMHeadModel),
        ("stored:net", {"width": 3}, nn.Sequential),
        ("torch.nn:Linear", {"in_features": 2, "out_features": 3}, nn.Linear),
    ],
)
def test_every_form_builds_and_is_remembered(spec: str, kwargs: dict[str, Any], kind: type) -> None:
    model = build(spec, **kwargs)
    assert isinstance(model, kind)
    assert spec_of(model) == spec_of(copy.deepcopy(model)) == Spec(spec, kwargs)
    assert not any("secateur" in name for name in model.state_dict())


def scribble(values: dict[str, int]) -> nn.Module:
    values["width"] = 9
    return nn.Linear(2, 2)


def test_values_are_kept_as_they_were_given() -> None:
    assert spec_of(build("test_build:scribble", values={"width": 2})) == Spec(
        "test_build:scribble", {"values": {"width": 2}}
    )
    widths = [2, 3]
    model = build("s3", widths=widths)
    widths.append(4)
    assert spec_of(model) == Spec("s3", {"widths": [2, 3]})
    assert spec_of(build("s3", widths=(2, 3))) == Spec("s3", {"widths": [2, 3]})


@pytest.mark.parametrize(
    ("spec", "kwargs", "match"),
    [
        ("s4", {}, "no model is called 's4'; nearest: s3"),
        ("torchvision:resnet81", {}, "nearest: resnet18"),
        ("torchvision:resnet18", {"num_clases": 3}, "num_clases"),
        ("torchvision:resnet18", {"num_classes": object()}, "JSON"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "weights='DEFAULT' would fetch"),
        ("timm:convnext_ato", {}, "nearest: convnext_atto"),
        ("timm:hf-hub:a/b", {}, "timm has no model called 'hf-hub:a/b'"),
        ("timm:resnet18", {"pretrained": True}, "would fetch"),
        ("transformers:BertModl", {}, "nearest: BertModel"),
        ("transformers:BertConfig", {}, "no model class"),
        (
            "transformers:BertModel",
            {"config": {"hiden_size": 3}},
            "no option 'hiden_size'; nearest: hidden_size",
        ),
        ("transformers:BertModel", {"config": 3}, "must be a mapping"),
        ("transformers:BertModel", {"config": {**BERT, "num_attention_heads": 3}}, "cannot be built"),
        ("transformers:BertModel", {"config": {"attn_implementation": "some/kernel"}}, "fetch a kernel"),
        ("nowhere.at_all:f", {}, "cannot import 'nowhere.at_all'"),
        ("stored:nett", {}, "'nett' is not in it; nearest: net"),
        ("stored:__name__", {}, "is not callable"),
        ("json:dumps", {"obj": 1}, "returned str"),
        ("", {}, "no model is called ''"),
        (":", {}, "cannot"),
    ],
)
def test_wrong_names_and_values_are_explained(spec: str, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        build(spec, **kwargs)
    assert isinstance(caught.value, SecateurError)
    assert "\n" not in str(caught.value)[:80]


def test_a_constructor_cannot_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    seen = []

    class Nosy(transformers.BertModel):
        def __init__(self, config: Any) -> None:
            seen.append(constants.HF_HUB_OFFLINE)
            super().__init__(config)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sys.modules["transformers"], "BertModel", Nosy)
    build("transformers:BertModel", config=BERT)
    assert seen == [True]
    assert constants.HF_HUB_OFFLINE is False


def test_models_made_elsewhere_are_recognised() -> None:
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))
    for model in (timm.create_model("resnet18", num_classes=3, in_chans=1), bert, Plain()):
        spec = spec_of(model)
        assert spec is not None
        twin = build(spec.spec, **spec.kwargs)
        assert type(twin) is type(model)
        assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_timm_models_of_older_versions_are_recognised_by_their_sizes() -> None:
    model = timm.create_model("resnet18", num_classes=3, in_chans=2)
    model.__dict__.pop("_model_args", None)
    assert spec_of(model) == Spec("timm:resnet18", {"num_classes": 3, "in_chans": 2})


def test_models_that_could_be_anything_are_not_guessed() -> None:
    class Local(nn.Module):
        pass

    main = type("Main", (nn.Module,), {"__module__": "__main__"})
    for model in (nn.Sequential(nn.ReLU()), Optional(3), Local(), main(), torchvision.models.resnet18()):
        assert spec_of(model) is None


def test_trust_names_modules_and_packages() -> None:
    assert trusted("s3")
    assert trusted("torchvision:resnet18")
    assert not trusted("stored:net")
    assert trusted("a.b.c:f", ["a.b"])
    assert not trusted("a.bc:f", ["a.b"])
    assert not trusted("torchvision.models:resnet18")
    assert not trusted(":f", [])


def test_building_twice_gives_two_models() -> None:
    first, second = build("s3"), build("s3")
    assert not torch.equal(first[0].weight, second[0].weight)


@pytest.mark.parametrize("name", MODELS)
def test_every_registered_model_takes_the_facts_about_the_data_and_comes_back(name: str, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    classes = {"classes": 5} if "classes" in inspect.signature(MODELS[name]).parameters else {}
    model = build(name, **classes, in_channels=3, image_size=32)
    found = load(save(model, tmp_path / "a.safetensors"))
    shapes = [t.shape for t in stored.outputs(found, images)]
    assert shapes == [(2, 5)] if classes else shapes[0] == images.shape
    assert stored.same(stored.outputs(model, images), stored.outputs(found, images))
    assert MODELS[name].__doc__

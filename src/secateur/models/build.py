"""Build a model from a name and JSON values, and say how a given model can be built again.

Five forms of ``spec``: a name of the registry (``"s3cnn"``), ``"torchvision:resnet18"``,
``"timm:convnext_atto"``, ``"transformers:BertModel"`` (with ``config={...}``) and ``"my.package:factory"``.
The first four can only reach code that is already installed and chosen by its library's own list; the last
one imports a module by name, so a checkpoint may use it only if its reader trusts that module (``trusted``).
Nothing is ever downloaded: weights are random until a checkpoint is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from secateur.types import SecateurError

ATTENTION = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "paged|eager"}
MUST_BE_OFF = {
    "auto_map", "cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "quantization_config", "quantize", "trust_remote_code", "use_kernels", "use_pretrained_backbone",
    "weights", "weights_backbone",
}  # fmt: skip


class ModelError(SecateurError):
    """A model that cannot be found, imported or built."""


@dataclass(frozen=True)
class Spec:
    """How to build a model: its name and the JSON values its builder takes.

    >>> Spec("torchvision:resnet18", {"num_classes": 10}).spec
    'torchvision:resnet18'
    """

    spec: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def build(spec: str, /, **kwargs: Any) -> nn.Module:
    """Return the model that ``spec`` and the JSON values ``kwargs`` describe, with random weights.

    The model carries the ``Spec`` as ``model._secateur_spec``, so that its checkpoint says how to build it.
    Raises ``ModelError`` with the nearest valid names when the name, a package or a value is wrong.

    >>> build("torch.nn:Linear", in_features=2, out_features=3)
    Linear(in_features=2, out_features=3, bias=True)
    """
    kwargs = _json_values(spec, kwargs)
    source, _, name = spec.partition(":")
    if source in SOURCES:
        _refuse_downloads(spec, kwargs)
    with _explained(spec):
        own = copy.deepcopy(kwargs)  # some builders write into what they are given
        model = SOURCES[source](name, own) if source in SOURCES else _factory(spec, own)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec!r} returned {type(model).__name__}; a builder must return an nn.Module.")
    model._secateur_spec = Spec(spec, kwargs)  # type: ignore[assignment]
    return model


def spec_of(model: nn.Module) -> Spec | None:
    """Return how ``model`` can be built again, or ``None`` when nothing about it says so.

    Known are models from ``build``, from ``timm.create_model``, of transformers classes, and of importable
    top-level classes whose constructor takes no arguments.
    """
    known = getattr(model, "_secateur_spec", None)
    if isinstance(known, Spec):
        return known
    package = type(model).__module__.partition(".")[0]
    guess = {"timm": _timm_spec, "transformers": _transformers_spec}.get(package, _class_spec)(model)
    try:
        return Spec(guess.spec, _json_values(guess.spec, guess.kwargs)) if guess else None
    except ModelError:
        return None


def trusted(spec: str, trust: Iterable[str] = ()) -> bool:
    """Return whether a name found in a file may be built: library and registry names always may.

    ``"my.package.nets:factory"`` may when ``trust`` names its module or a package above it.

    >>> trusted("timm:resnet18"), trusted("os:system"), trusted("my.nets:f", ["my"])
    (True, False, True)
    """
    source, colon, _ = spec.partition(":")
    if not colon or source in SOURCES:
        return True
    return any(source == name or source.startswith(name + ".") for name in trust)


def _registry(name: str, kwargs: dict[str, Any]) -> Any:
    registry = importlib.import_module("secateur.models").MODELS
    if name not in registry:
        raise ModelError(
            f"no model is called {name!r}{_nearest(name, registry)} "
            "Other forms: torchvision:NAME, timm:NAME, transformers:CLASS, package.module:factory."
        )
    return registry[name](**kwargs)


def _torchvision(name: str, kwargs: dict[str, Any]) -> Any:
    library = _package("torchvision", "vision").models
    names = library.list_models()
    if name not in names:
        raise ModelError(f"torchvision has no model called {name!r}{_nearest(name, names)}")
    builder = library.get_model_builder(name)
    taken = inspect.signature(builder).parameters
    kwargs |= {key: None for key in ("weights", "weights_backbone") if key in taken}
    if name in ("googlenet", "inception_v3"):  # they warn when the choice is left open; this is their default
        kwargs.setdefault("init_weights", True)
    return builder(**kwargs)


def _timm(name: str, kwargs: dict[str, Any]) -> Any:
    library = _package("timm")
    if name.partition(".")[0] not in library.list_models():  # also refuses hf-hub:... and local-dir:... names
        raise ModelError(f"timm has no model called {name!r}{_nearest(name, library.list_models())}")
    return library.create_model(name, **{**kwargs, "pretrained": False})


def _transformers(name: str, kwargs: dict[str, Any]) -> Any:
    library = _package("transformers")
    base = library.PreTrainedModel
    found = getattr(library, name, None) if name in dir(library) else None
    if not (isinstance(found, type) and issubclass(found, base) and getattr(found, "config_class", None)):
        names = [n for n in dir(library) if n.endswith(("Model", "LM")) or "For" in n]
        raise ModelError(f"transformers has no model class called {name!r}{_nearest(name, names)}")
    config = kwargs.pop("config", {})
    if not isinstance(config, dict):
        raise ModelError(f"config of transformers:{name} must be a mapping; got {config!r}.")
    known = _config_keys(found.config_class)
    for key in config if known else ():
        if key not in known:
            raise ModelError(f"{found.config_class.__name__} has no option {key!r}{_nearest(key, known)}")
    with _offline():
        return found(found.config_class.from_dict(config), **kwargs)


def _factory(spec: str, kwargs: dict[str, Any]) -> Any:
    if ":" not in spec:
        return _registry(spec, kwargs)
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        hint = "is its folder on PYTHONPATH?"
        raise ModelError(f"{spec!r}: cannot import {module_name!r} ({error}); {hint}") from error
    found = getattr(module, name, None)
    if not callable(found):
        what = "is not callable" if found is not None else "is not in it"
        names = [n for n, value in vars(module).items() if callable(value)]
        raise ModelError(f"{module_name!r} was imported, but {name!r} {what}{_nearest(name, names)}")
    return found(**kwargs)


SOURCES: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}


def _timm_spec(model: nn.Module) -> Spec | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    name = config.get("architecture")
    if not name:
        return None
    kwargs = getattr(model, "_model_args", None)  # newer timm keeps what create_model was given
    if kwargs is None:
        first = config.get("first_conv")
        stem = dict(model.named_modules()).get(first) if isinstance(first, str) else None
        known = {
            "num_classes": getattr(model, "num_classes", None),
            "in_chans": getattr(stem, "in_channels", None),
        }
        kwargs = {key: value for key, value in known.items() if value is not None}
    return Spec(f"timm:{name}", {k: v for k, v in kwargs.items() if k not in MUST_BE_OFF})


def _transformers_spec(model: nn.Module) -> Spec | None:
    config_class = getattr(type(model), "config_class", None)
    config: Any = getattr(model, "config", None)
    if config_class is None or config is None:
        return None
    known = _config_keys(config_class)
    values = json.loads(config.to_json_string(use_diff=False))
    values = {k: v for k, v in values.items() if (not known or k in known) and not k.startswith("_")}
    attention = getattr(config, "_attn_implementation", None)
    if attention in ATTENTION:
        values["attn_implementation"] = attention
    values = {k: v for k, v in values.items() if k not in MUST_BE_OFF}
    return Spec(f"transformers:{type(model).__name__}", {"config": values})


def _class_spec(model: nn.Module) -> Spec | None:
    cls = type(model)
    if cls.__module__ == "__main__" or "." in cls.__qualname__:
        return None
    try:
        importable = getattr(importlib.import_module(cls.__module__), cls.__qualname__, None) is cls
        fixed = not inspect.signature(cls).parameters  # with options, which ones were used cannot be known
    except (ImportError, ValueError):
        return None
    return Spec(f"{cls.__module__}:{cls.__qualname__}") if importable and fixed else None


def _config_keys(config_class: Any) -> set[str]:
    """Return the options a transformers config knows; empty when its class has no default form."""
    try:
        default = config_class()
    except (TypeError, ValueError):
        return set()
    also = {"attn_implementation", "experts_implementation", "torch_dtype", "dtype"}
    also |= {name for name, _ in inspect.getmembers(config_class, lambda v: isinstance(v, property))}
    return set(default.to_dict()) | set(vars(default)) | set(config_class.attribute_map) | also


def _json_values(spec: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(kwargs)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"arguments of {spec!r} must be JSON values: {error}.") from error


def _refuse_downloads(spec: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in MUST_BE_OFF and item:
                raise ModelError(f"{spec!r}: {key}={item!r} would fetch or run something; leave it out.")
            if "implementation" in key:
                _refuse_kernels(spec, key, item)
            _refuse_downloads(spec, item)
    elif isinstance(value, list):
        for item in value:
            _refuse_downloads(spec, item)


def _refuse_kernels(spec: str, key: str, value: Any) -> None:
    names = value.values() if isinstance(value, dict) else [value]
    for name in names:  # transformers takes "owner/repo" here and would fetch and run that kernel
        if isinstance(name, str) and ("/" in name or ":" in name):
            valid = ", ".join(sorted(ATTENTION))
            raise ModelError(f"{spec!r}: {key}={name!r} would fetch a kernel; use one of {valid}.")


def _package(name: str, extra: str | None = None) -> Any:
    try:
        if name == "torchvision":
            importlib.import_module("torchvision.models")
        return importlib.import_module(name)
    except ImportError as error:
        todo = f"pip install 'secateur[{extra or name}]'"
        raise ModelError(f"{name} cannot be imported ({error}); {todo}.") from error


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}." if near else "."


@contextlib.contextmanager
def _explained(spec: str) -> Iterator[None]:
    """Turn whatever a builder raises on wrong values into one ``ModelError``."""
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        raise ModelError(f"{spec!r} cannot be built: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the hub client from reaching out while a constructor runs (some fetch a backbone's config)."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before

"""transformers: every common kind of model from a small configuration of realistic structure, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.suites.case import Case, Inputs

VOCABULARY = 99
CASES: list[Case] = []


def words(length: int = 7) -> Inputs:
    """Token ids with an attention mask (the last sample is padded at its end)."""

    def make(batch: int) -> dict[str, Any]:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, -2:] = 0
        return {"input_ids": torch.randint(3, VOCABULARY, (batch, length)), "attention_mask": mask}

    return make


def causal(length: int = 7) -> Inputs:
    """Token ids alone."""
    return lambda batch: {"input_ids": torch.randint(3, VOCABULARY, (batch, length))}


def pairs(batch: int) -> dict[str, Any]:
    """Token ids of encoder and decoder."""
    return {
        "input_ids": torch.randint(3, VOCABULARY, (batch, 7)),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 5)),
    }


def pixels(size: int = 32, **more: Callable[[int], torch.Tensor]) -> Inputs:
    """Images, and whatever ``more`` makes."""
    return lambda batch: {"pixel_values": torch.randn(batch, 3, size, size), **{k: f(batch) for k, f in more.items()}}


def sound(samples: int = 1600) -> Inputs:
    """Raw audio."""
    return lambda batch: {"input_values": torch.randn(batch, samples)}


def kind(model: str, inputs: Inputs, *, name: str = "", config: str = "", **settings: Any) -> None:
    """List ``model`` (a class of transformers) with ``settings`` for its configuration class."""

    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, model)
        made = getattr(transformers, config) if config else cls.config_class
        return cls(made(**settings))

    CASES.append(Case("transformers", name or model, make, inputs))


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
}
GROUPED: dict[str, Any] = {
    **TEXT,
    "num_key_value_heads": 2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}

"""Models: one file per family; the import list below is the registry.

A builder takes ``classes``, ``in_channels``, ``image_size`` and its own JSON arguments, and returns a module
with random weights.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from secateur.models.mlp import mlp
from secateur.models.resnet20 import resnet20
from secateur.models.s3 import s3
from secateur.models.small_cnn import small_cnn

MODELS: dict[str, Callable[..., nn.Module]] = {f.__name__: f for f in (mlp, resnet20, s3, small_cnn)}

__all__ = ["MODELS"]

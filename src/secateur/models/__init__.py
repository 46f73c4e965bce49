"""Models: one file per family; the import list below is the registry.

A builder takes ``classes``, ``in_channels``, ``image_size`` and its own JSON arguments, and returns a module
with random weights.  One that takes no ``classes`` returns a model of images, not a classifier.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from secateur.models.cifar_resnet import resnet20, resnet32, resnet56, resnet110
from secateur.models.cifarnet import cifarnet
from secateur.models.densenet import densenet
from secateur.models.mlp import mlp
from secateur.models.s0 import s0
from secateur.models.s1_cnn import s1_cnn
from secateur.models.s3 import s3
from secateur.models.small_cnn import small_cnn
from secateur.models.vae import small_vae, vae
from secateur.models.vgg import vgg
from secateur.models.wide_resnet import wide_resnet

BUILDERS = (
    cifarnet, densenet, mlp, resnet20, resnet32, resnet56, resnet110, s0, s1_cnn, s3, small_cnn, small_vae, vae, vgg,
    wide_resnet,
)  # fmt: skip
MODELS: dict[str, Callable[..., nn.Module]] = {builder.__name__: builder for builder in BUILDERS}

__all__ = ["MODELS"]

"""What stands behind every fast layer: the model itself, and the comparison with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from secateur.types import EngineError

TOLERANCE = 1e-3  # of the largest output, on the example; a wrong kernel is off by far more


class Fallback:
    """The model itself in eval mode, where a faster layer cannot run it; ``reason`` says why."""

    def __init__(self, model: nn.Module, reason: str) -> None:
        self.model = model
        self.reason = reason

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the model."""
        with torch.no_grad():
            return self.model.eval()(x.detach().float())


def check(fast: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, example: torch.Tensor, name: str) -> None:
    """Raise ``EngineError`` when ``fast``, called ``name``, and ``model`` in eval mode disagree on the example."""
    with torch.no_grad():
        expected = model(example.detach().float())
    got = fast(example)
    if not expected.numel():
        return
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= TOLERANCE and bool(expected.isfinite().all()):
        raise EngineError(f"{name} is off by {error:.1e} of the largest output on the example; please report it.")


def checked(
    make: Callable[[], Callable[..., torch.Tensor]], model: nn.Module, example: torch.Tensor, name: str, strict: bool
) -> Callable[..., torch.Tensor]:
    """Return what ``make`` makes of ``model`` in eval mode, compared with it on the example.

    Where that raises ``EngineError``, a ``Fallback`` with the reason, or the error itself when ``strict``.
    """
    training = model.training
    model.eval()
    try:
        fast = make()
        check(fast, model, example, name)
        return fast
    except EngineError as error:
        if strict:
            raise EngineError(str(error)) from error
        return Fallback(model, str(error))
    finally:
        model.train(training)

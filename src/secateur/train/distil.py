"""Distillation: the dense parent teaches the small network its scores and, if wanted, its last hidden layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from secateur.graph.state import eval_mode, state_kept
from secateur.measure.accuracy import logits
from secateur.train.loop import Guide, TrainError

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def taught(
    student: nn.Module,
    teacher: nn.Module,
    example: torch.Tensor,
    *,
    temperature: float = 4.0,
    mix: float = 0.9,
    features: float = 0.0,
    whole: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
) -> Iterator[Guide]:
    """Yield what turns the loss L of a step into (1 - mix) L + mix T^2 KL(teacher || student) + features S.

    KL is that of the class probabilities at ``temperature`` T, mean over the images (Hinton et al. 2015, arXiv
    1503.02531); S is ``similarity`` of the last hidden activations.  The teacher stays in eval mode meanwhile and gets
    no gradients; both see the same (augmented, blended) images.  ``example``: inputs of the student.  ``whole`` is
    that of ``devices.Team`` where several processes divide the batch: S is about pairs of its images.
    """
    held: dict[str, torch.Tensor] = {}
    handles = []
    if features > 0:
        for name, model in (("student", student), ("teacher", teacher)):
            module = model.get_submodule(last_weighted(model, example))
            handles.append(module.register_forward_pre_hook(_keep(held, name)))

    def guide(inputs: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        with torch.no_grad():
            answer = logits(teacher(inputs)).float()

        def judge(output: Any, loss: torch.Tensor) -> torch.Tensor:
            loss = (1 - mix) * loss + mix * divergence(logits(output).float(), answer, temperature)
            if features > 0:
                loss = loss + features * similarity(*(whole(held[name].flatten(1)) for name in ("student", "teacher")))
            return loss

        return judge

    try:
        with eval_mode(teacher):
            yield guide
    finally:
        for handle in handles:
            handle.remove()


def _keep(held: dict[str, torch.Tensor], name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        held[name] = args[0]

    return hook


def divergence(scores: torch.Tensor, answer: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 KL(softmax(answer / T) || softmax(scores / T)), mean over the rows of (n, classes), in nats.

    >>> scores = torch.tensor([[0.0, 1.0]])
    >>> float(divergence(scores, scores + 3, 4.0)), round(float(divergence(scores, -scores, 1.0)), 4)
    (0.0, 0.4621)
    """
    ours, theirs = (F.log_softmax(x / temperature, 1) for x in (scores, answer))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def similarity(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return how differently two layers see which images are alike: |G - G'|^2 / n^2.

    G are the n x n inner products of the activations of the n images, each row of length 1.  The widths may differ,
    as they do after a cut.  Source: Tung and Mori 2019, arXiv 1907.09682, equations 1 to 4.

    >>> x = torch.eye(2)
    >>> float(similarity(x, 3 * x)), float(similarity(x, torch.ones(2, 5)))
    (0.0, 0.2928...)
    """
    first, second = (F.normalize(x.float().flatten(1) @ x.float().flatten(1).T, dim=1) for x in (ours, theirs))
    return (first - second).square().sum() / len(ours) ** 2


def last_weighted(model: nn.Module, example: torch.Tensor) -> str:
    """Return the path of the linear or convolution layer that runs last; its input is the last hidden layer.

    Raises ``TrainError`` for a model that has none.
    """
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, WEIGHTED)
    ]
    try:
        with eval_mode(model), state_kept(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise TrainError("this model runs no linear or convolution layer, so it has no last hidden layer to teach.")
    return ran[-1]

"""What a cut model can begin its recovery with: fresh statistics of its batch norms, or other weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.compact import LINEAGE, Surgery, take
from secateur.graph.state import eval_mode
from secateur.train.average import Tensors, tensors_of
from secateur.train.loop import TrainError


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Set the running statistics of all batch norms to the mean over ``batches`` of inputs; return their number.

    Forward passes only; everything else is in eval mode.  Source: Li et al. 2020 (EagleEye), arXiv 2007.02491, sec. 3.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return 0
    with eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None: the mean over all batches
        for inputs in batches:
            model(inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False
    return len(norms)


def cut_along(small: nn.Module, dense: Mapping[str, torch.Tensor], cut: bool) -> Tensors:
    """Return the tensors of ``small`` taken from those of its ``dense`` parent at the positions that stayed.

    ``cut`` says whether anything was cut.  Raises ``TrainError`` when ``small`` was not compacted in this process.
    """
    surgery = small.__dict__.get(LINEAGE)
    slices = surgery.slices if cut and isinstance(surgery, Surgery) else {}
    found = {
        name: take(dense[name].to(own.device), slices.get(name, ())) if name in dense else own
        for name, own in tensors_of(small).items()
    }
    wrong = [name for name, own in tensors_of(small).items() if found[name].shape != own.shape]
    if wrong:
        raise TrainError(
            f"{wrong[0]!r} of the cut model has another shape than the same cut of its parent gives; "
            "use recover.name: finetune for this model, and report it."
        )
    return found


def begin_anew(small: nn.Module, fresh: nn.Module, cut: bool) -> None:
    """Give ``small`` the weights that its builder would draw: those of ``fresh``, a newly built parent, cut along.

    Builders draw linear and convolution weights with a deviation that falls as 1 / sqrt(inputs per unit), so these
    (and their biases) grow by the square root of how much the inputs shrank.  Running statistics begin anew; other
    buffers stay.
    """
    found = cut_along(small, tensors_of(fresh), cut)
    dense = tensors_of(fresh)
    drawn = {name for name, _ in small.named_parameters(remove_duplicate=False)}
    for path, module in small.named_modules():
        prefix = f"{path}." if path else ""
        weight = dense.get(f"{prefix}weight")
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and weight is not None and module.weight.numel():
            factor = (weight[0].numel() / module.weight[0].numel()) ** 0.5
            found |= {prefix + n: found[prefix + n] * factor for n, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.modules.batchnorm._NormBase):
            drawn |= {prefix + name for name, _ in module.named_buffers(recurse=False)}
    small.load_state_dict({name: found[name] for name in drawn}, strict=False)

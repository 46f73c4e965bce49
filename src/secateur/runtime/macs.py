"""Multiply-accumulates of a gated network, per sample, as its gates choose."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from secateur.runtime.gates import FBS, Choice, watch
from secateur.runtime.program import Node, Program, read


def macs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the multiply-accumulates (B,) int64 that each sample of ``inputs`` (B, C, H, W) needs.

    taps * active inputs * active outputs * output pixels of every convolution, and the linear layers; sets pass
    through pooling, activations, dropout and concatenation, a sum has the union.  The predictors of the gates and
    the scaling are not counted: they are ``overhead``.

    >>> from secateur.models.cifarnet import cifarnet
    >>> from secateur.runtime.gates import gate
    >>> x = torch.rand(1, 3, 32, 32)
    >>> macs(gate(cifarnet(), 0.5, x).model, x).item()
    43964736
    """
    program = read(model, inputs)
    training = model.training
    with watch(model.eval()) as choices, torch.no_grad():
        model(inputs)
    model.train(training)
    return counted(program, choices, len(inputs))


def counted(program: Program, choices: Mapping[str, Choice], batch: int) -> torch.Tensor:
    """Return the multiply-accumulates (B,) of ``program`` under ``choices`` (those of ``watch``)."""
    active: dict[int, torch.Tensor] = {}
    units = program.shapes[program.nodes[0].ins[0]][0]
    active[program.source] = torch.ones(batch, units, dtype=torch.bool)
    total = torch.zeros(batch, dtype=torch.int64)
    for node in program.nodes:
        masks = [active[value] for value in node.ins]
        if node.kind in ("conv", "linear"):
            full = torch.ones(batch, program.shapes[node.out][0], dtype=torch.bool)
            out = choices[node.path].mask if node.gate is not None else full
            total += _products(program, node, masks[0], out)
            active[node.out] = out
        elif node.kind == "cat":
            active[node.out] = torch.cat(masks, dim=1)
        else:
            active[node.out] = torch.stack(masks).any(0)
    return total


def _products(program: Program, node: Node, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    groups, kernel = node.groups, node.kernel
    _, height, width = program.shapes[node.out]
    per_group = [mask.unflatten(1, (groups, -1)).sum(2) for mask in (inputs, outputs)]
    pixels = program.shapes[node.ins[0]][1:] if node.kind == "linear" else (height, width)
    return (per_group[0] * per_group[1]).sum(1) * (kernel[0] * kernel[1] * pixels[0] * pixels[1])


def overhead(model: nn.Module) -> int:
    """Return what the gates themselves multiply per sample, at most: inputs times outputs of every predictor."""
    return sum(gate.predictor.weight.numel() for gate in model.modules() if isinstance(gate, FBS))

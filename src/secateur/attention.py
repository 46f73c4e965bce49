"""A multi-head attention whose inner width may differ from its embedding width, still an nn.MultiheadAttention.

``torch.nn.MultiheadAttention`` requires heads x head_dim == embed_dim, so neither heads nor embedding channels can
go alone.  ``compact`` changes the class of such a module to ``FittedAttention``: same parameters, same call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.types import Graph


class FittedAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with free sizes; made by ``compact``, never constructed.

    ``scale`` stays 1/sqrt(head_dim) of the dense module; ``rows`` are those of queries, keys and values in the packed
    weight (heads x head_dim each, values may differ); ``kept_heads`` are the dense module's.
    """

    scale: float
    head_dim: int
    rows: list[int]
    kept_heads: list[int]

    def forward(  # noqa: D102
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, self.dropout, self.training)
            out = weights @ v
        else:
            weights = None
            rate = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, rate, scale=self.scale)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if single:
            out = out.squeeze(0 if self.batch_first else 1)
            weights = weights.squeeze(0) if weights is not None else None
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(self.rows)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Any = [None] * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split([w.shape[0] for w in weights])
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        total = None
        for mask, is_padding in ((attn_mask, False), (padding, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
            extra = k.shape[-2] - mask.shape[-1]
            mask = F.pad(mask.to(q.dtype), (0, extra)) if extra > 0 else mask.to(q.dtype)
            if is_padding:
                mask = mask.view(-1, 1, 1, mask.shape[-1])
            elif mask.dim() == 3:
                mask = self._per_head(mask, q.shape[0])
            total = mask if total is None else total + mask
        return total

    def _per_head(self, mask: Tensor, batch: int) -> Tensor:
        """(batch x dense heads, L, S) masks keep the rows of the heads that stayed."""
        dense = mask.unflatten(0, (batch, -1))
        if dense.shape[1] == self.num_heads:
            return dense
        return dense[:, torch.tensor(self.kept_heads, device=mask.device)]  # type: ignore[attr-defined]


def fit_attention(
    path: str,
    module: nn.MultiheadAttention,
    graph: Graph,
    shapes: dict[str, tuple[int, ...]],
    kept: np.ndarray,
) -> dict[str, Any] | None:
    """Return the attributes of the fitted module, or None when none of its tensors changes."""
    own = {name: shapes.get(f"{path}.{name}" if path else name) for name, _ in module.named_parameters()}
    if not any(own.values()):
        return None
    packed = module.in_proj_weight is not None
    name = "in_proj_weight" if packed else "q_proj_weight"
    axes = graph.axes[f"{path}.{name}" if path else name][0]
    heads, head_dim = int(module.num_heads), int(module.head_dim)
    alive = np.ones(heads * head_dim, dtype=bool) if axes is None else kept[axes[: heads * head_dim]]
    grid = alive.reshape(heads, head_dim)
    kept_heads = np.flatnonzero(grid.any(axis=1))
    width = int(grid.sum())
    total = (own.get(name) or tuple(getattr(module, name).shape))[0]
    before = getattr(module, "kept_heads", range(heads))
    out_shape = own.get("out_proj.weight") or tuple(module.out_proj.weight.shape)
    return {
        "num_heads": len(kept_heads),
        "head_dim": width // max(len(kept_heads), 1),
        "embed_dim": int(out_shape[0]),
        "scale": float(getattr(module, "scale", head_dim**-0.5)),
        "rows": [width, width, total - 2 * width] if packed else [],
        "kept_heads": [int(before[k]) for k in kept_heads],
        "_qkv_same_embed_dim": False,
    }


FITTED = ("num_heads", "head_dim", "embed_dim", "scale", "rows", "kept_heads", "_qkv_same_embed_dim")


def swap(model: nn.Module, path: str, attributes: dict[str, Any]) -> None:
    """Turn the attention at ``path`` into a ``FittedAttention`` with these attributes."""
    module = model.get_submodule(path)
    module.__class__ = FittedAttention
    module.__dict__.update({name: attributes[name] for name in FITTED})

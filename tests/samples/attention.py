"""Softmaxes, and attention as models use it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fxhess.testing import Sample

BOX = (3, 4)
HEADS = (2, 4, 3)
D = torch.float64


def _attend(x: torch.Tensor, **options: object) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x.sin(), x.cos(), **options)


def _grouped(x: torch.Tensor) -> torch.Tensor:
    queries = torch.cat([x, x.sin()], 1)
    return F.scaled_dot_product_attention(queries, x.cos(), x, enable_gqa=True)


torch.manual_seed(0)
MASK = torch.rand(4, 4) < 0.6
BIAS = torch.randn(2, 4, 4, dtype=D)
PADDING = torch.tensor([False, False, True])
ATTENTION = nn.MultiheadAttention(4, 2, batch_first=True, dtype=D)
CROSS = nn.MultiheadAttention(4, 2, kdim=2, vdim=2, batch_first=True, add_bias_kv=True, dtype=D)
LAYER = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, dtype=D)
GELU = nn.TransformerEncoderLayer(
    4, 1, 6, 0.1, F.gelu, batch_first=True, norm_first=True, dtype=D
).eval()
DECODER = nn.TransformerDecoderLayer(4, 2, 6, 0.0, batch_first=True, dtype=D)

SAMPLES = [
    Sample("softmax", lambda x: F.softmax(x, 1)),
    Sample("softmax inner", lambda x: torch.softmax(x, -2), BOX),
    Sample("softmax dtype", lambda x: F.softmax(x, -1, dtype=D), BOX),
    Sample("softmax far", lambda x: F.softmax(500 * x, -1), tolerance=1e-8),
    Sample("softmin", lambda x: F.softmin(x, -1), BOX),
    Sample("log_softmax", lambda x: F.log_softmax(x, 1)),
    Sample("log_softmax inner", lambda x: F.log_softmax(x, -2), BOX),
    Sample("log_softmax far", lambda x: F.log_softmax(500 * x, -1), tolerance=1e-8),
    Sample("attention", _attend, HEADS),
    Sample("attention causal", lambda x: _attend(x, is_causal=True), HEADS),
    Sample("attention masked", lambda x: _attend(x, attn_mask=MASK), HEADS),
    Sample("attention biased", lambda x: _attend(x, attn_mask=BIAS, scale=0.3), HEADS),
    Sample("attention without heads", _attend, (4, 3)),
    Sample("attention, grouped queries", _grouped, HEADS),
    Sample("attention, no dropout", lambda x: _attend(x, dropout_p=0.0), HEADS),
    Sample("MultiheadAttention", lambda x: torch.cat(ATTENTION(x, x, x), -1), (3, 4)),
    Sample(
        "MultiheadAttention, values only",
        lambda x: ATTENTION(x, x, x, need_weights=False)[0],
        (3, 4),
    ),
    Sample(
        "MultiheadAttention, every head",
        lambda x: ATTENTION(x, x, x, average_attn_weights=False)[1],
        (3, 4),
    ),
    Sample(
        "MultiheadAttention, padding",
        lambda x: ATTENTION(x, x, x, key_padding_mask=PADDING.expand(x.shape[0], 3))[0],
        (3, 4),
    ),
    Sample(
        "MultiheadAttention, causal",
        lambda x: ATTENTION(
            x, x, x, attn_mask=torch.ones(3, 3, dtype=torch.bool).triu(1), need_weights=False
        )[0],
        (3, 4),
    ),
    Sample("MultiheadAttention, cross", lambda x: CROSS(x, x[..., :2], x[..., 2:])[0], (3, 4)),
    Sample("TransformerEncoderLayer", LAYER, (3, 4)),
    Sample("TransformerEncoderLayer, evaluated", GELU, (3, 4)),
    Sample("TransformerDecoderLayer", lambda x: DECODER(x, x.sin()), (3, 4)),
]

"""Transformers: encoders, decoders, masks, rotary embeddings, grouped heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from zoo import Apply, Case

N, E = 3, 4  # tokens, features
D = torch.float64
CAUSAL = nn.Transformer.generate_square_subsequent_mask(N).double()
PADDING = torch.tensor([False, False, True])


def _layer(**options: Any) -> nn.TransformerEncoderLayer:
    given = {"dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerEncoderLayer(E, 2, 6, **given)


def _encoder(
    training: bool = True, depth: int = 0, nested: bool = False, **options: Any
) -> nn.Module:
    """A stack of so many layers; 0: one layer as it is."""
    layer = _layer(**options)
    stack = nn.TransformerEncoder(layer, depth, enable_nested_tensor=nested) if depth else layer
    return stack.train(training)


def _summed(y: torch.Tensor) -> torch.Tensor:
    """One smooth number a sample from tokens ``[batch, n, e]``."""
    weights = torch.linspace(0.5, 1.5, y.shape[1] * y.shape[2], dtype=y.dtype)
    return (y * weights.view(y.shape[1:])).tanh().sum((1, 2))


def _plain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _summed(module(x))


def _sequence_first(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _summed(module(x.transpose(0, 1)).transpose(0, 1))


def _masked(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _summed(module(x, src_mask=CAUSAL) if isinstance(module, nn.TransformerEncoderLayer)
                   else module(x, mask=CAUSAL))  # fmt: skip


def _causal(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _summed(module(x, mask=CAUSAL, is_causal=True))


def _padded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _summed(module(x, src_key_padding_mask=PADDING.expand(x.shape[0], N))[:, :2])


def _both_masks(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    padding = torch.zeros(x.shape[0], N, dtype=x.dtype).masked_fill(PADDING, -math.inf)
    return _summed(module(x, mask=CAUSAL, src_key_padding_mask=padding)[:, :2])


def _decoded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x is target and, shifted, memory."""
    return _summed(module(x, x.roll(1, 1).sin(), tgt_mask=CAUSAL))


def _memory_padded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    memory = torch.cat([x.cos(), x], 1)
    padding = torch.cat([PADDING, PADDING]).expand(x.shape[0], 2 * N)
    return _summed(module(x, memory, memory_key_padding_mask=padding))


def _both(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _summed(module(x, x.tanh(), tgt_mask=CAUSAL, tgt_is_causal=True))


def _two_stacks(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    t = x.transpose(0, 1)
    return _summed(module(t, t.tanh()).transpose(0, 1))


class Frozen(nn.Module):
    """Inference as PyTorch does it on its fast path: evaluated, and no gradient of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _encoder(training=False, depth=2, nested=True, activation="gelu")
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _summed(self.encoder(x))


class WithWeights(nn.Module):
    """Multi-head attention whose weights are used too, keys and values of other sizes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.key = nn.Linear(E, 5)
        self.attention = nn.MultiheadAttention(E, 2, kdim=5, vdim=5, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = torch.tanh(self.key(x))
        y, weights = self.attention(x, key, key, average_attn_weights=False)
        return _summed(y) + weights.square().sum((1, 2, 3))


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, as LLaMA computes it."""
    n, d = x.shape[-2:]
    inverse = 1.0 / (10000 ** (torch.arange(0, d, 2, dtype=x.dtype) / d))
    angle = torch.outer(torch.arange(n, dtype=x.dtype), inverse)
    angle = torch.cat([angle, angle], -1)
    one, two = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-two, one], -1) * angle.sin()


def _rotate_complex(x: torch.Tensor) -> torch.Tensor:
    """The same through complex numbers, as the original code does it."""
    n, d = x.shape[-2:]
    inverse = 1.0 / (10000 ** (torch.arange(0, d, 2, dtype=x.dtype) / d))
    turns = torch.polar(torch.ones(n, d // 2, dtype=x.dtype),
                        torch.outer(torch.arange(n, dtype=x.dtype), inverse))  # fmt: skip
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * turns).flatten(-2)


class RMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Llama(nn.Module):
    """Blocks of grouped-query attention with rotary embeddings and SwiGLU."""

    def __init__(
        self, rotate: Callable[[torch.Tensor], torch.Tensor] = _rotate, grouped: bool = False
    ) -> None:
        super().__init__()
        self.rotate, self.grouped = rotate, grouped
        self.heads, self.groups, self.size = 4, 2, 2
        width = self.heads * self.size
        self.embed = nn.Linear(E, width, bias=False)
        self.norm1, self.norm2, self.norm3 = RMSNorm(width), RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * self.groups * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 10, bias=False), nn.Linear(width, 10, bias=False)
        self.down = nn.Linear(10, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        h = self.embed(x)
        z = self.norm1(h)
        q = self.rotate(self.q(z).view(b, n, self.heads, self.size).transpose(1, 2))
        k, v = self.kv(z).view(b, n, 2, self.groups, self.size).permute(2, 0, 3, 1, 4)
        k = self.rotate(k)
        if self.grouped:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.o(y.transpose(1, 2).reshape(b, n, -1))
        z = self.norm2(h)
        h = h + self.down(F.silu(self.gate(z)) * self.up(z))
        return self.norm3(h)[:, -1].sum(-1)


class GPT(nn.Module):
    """Pre-norm blocks with one joint projection, learned positions and a head tied to the token
    embedding: the negative log-likelihood of given targets."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, E)
        self.positions = nn.Parameter(0.1 * torch.randn(N, E))
        self.ln1, self.ln2, self.ln = nn.LayerNorm(E), nn.LayerNorm(E), nn.LayerNorm(E)
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.mlp = nn.Sequential(nn.Linear(E, 8), nn.GELU("tanh"), nn.Linear(8, E))
        self.head = nn.Linear(E, 7, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("bias", torch.tril(torch.ones(N, N)).view(1, 1, N, N))
        self.register_buffer("targets", torch.tensor([2, 0, 5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.positions + self.tokens(self.targets)
        q, k, v = self.qkv(self.ln1(h)).split(E, dim=2)
        b, n, _ = q.size()
        q, k, v = (t.view(b, n, 2, E // 2).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = weights.masked_fill(self.bias[:, :, :n, :n] == 0, float("-inf"))
        y = F.softmax(weights, dim=-1) @ v
        h = h + self.out(y.transpose(1, 2).contiguous().view(b, n, E))
        h = h + self.mlp(self.ln2(h))
        logits = self.head(self.ln(h))
        targets = self.targets.expand(b, n)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)


class ViT(nn.Module):
    """Patches by convolution, a class token, one post-norm layer, logits of 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, E, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, E))
        self.positions = nn.Parameter(torch.randn(1, 5, E))
        self.block = _layer(norm_first=True, activation="gelu")
        self.head = nn.Linear(E, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        return self.head(self.block(h)[:, 0])


def _sdpa(x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    y = F.scaled_dot_product_attention(x, x.sin(), x.cos(), attn_mask=mask, scale=0.7)
    return y.square().sum((1, 2))


def _alibi(x: torch.Tensor) -> torch.Tensor:
    heads = x.view(x.shape[0], N, 2, E // 2).permute(0, 2, 1, 3)
    distance = torch.arange(N)[None, :] - torch.arange(N)[:, None]
    bias = distance.tril().to(x.dtype) * torch.tensor([0.5, 0.25], dtype=x.dtype)[:, None, None]
    scores = torch.einsum("bhid,bhjd->bhij", heads, heads.tanh()) + bias
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), heads).square().sum((1, 2, 3))


def _linear_attention(x: torch.Tensor) -> torch.Tensor:
    q, k = F.elu(x) + 1, F.elu(x.flip(-1)) + 1
    state = torch.einsum("bnd,bne->bnde", k, x).cumsum(1)
    norm = torch.einsum("bnd,bnd->bn", q, k.cumsum(1))
    return (torch.einsum("bnd,bnde->bne", q, state) / norm.unsqueeze(-1)).square().sum((1, 2))


def _case(name: str, build: Callable[[], nn.Module], call: Any = _plain) -> Case:
    return Case(name, lambda: Apply(build(), call), (N, E))


def _decoder(depth: int = 1, **options: Any) -> nn.Module:
    given = {"dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, 2, 6, **given), depth)


def _transformer(**options: Any) -> nn.Module:
    return nn.Transformer(E, 2, 1, 1, 6, dropout=0.0, **options)


CASES = [
    _case("encoder layer, training", _encoder),
    _case("encoder layer, evaluated", lambda: _encoder(False)),
    _case("encoder layer, norm first, gelu", lambda: _encoder(norm_first=True, activation="gelu")),
    _case("encoder layer, no bias", lambda: _encoder(bias=False)),
    _case("encoder layer, sequence first", lambda: _encoder(batch_first=False), _sequence_first),
    _case("encoder layer, source mask", _encoder, _masked),
    _case("encoder layer, padding, evaluated", lambda: _encoder(False), _padded),
    _case("encoder, training", lambda: _encoder(depth=2)),
    _case("encoder, evaluated, dropout", lambda: _encoder(False, 1, dropout=0.5)),
    _case("encoder, evaluated, causal", lambda: _encoder(False, 1), _causal),
    _case("encoder, nested tensors, padding", lambda: _encoder(False, 1, nested=True), _padded),
    _case("encoder, causal and float padding", lambda: _encoder(depth=1), _both_masks),
    Case("encoder, frozen", Frozen, (N, E)),
    _case("decoder", lambda: _decoder(2), _decoded),
    _case("decoder, evaluated, norm first", lambda: _decoder(norm_first=True).eval(), _decoded),
    _case("decoder, memory padding", _decoder, _memory_padded),
    _case("transformer", lambda: _transformer(batch_first=True), _both),
    _case("transformer, evaluated, sequence first", lambda: _transformer().eval(), _two_stacks),
    Case("multi-head attention, weights", WithWeights, (N, E)),
    Case("multi-head attention, extra keys", lambda: WithWeights(
        add_bias_kv=True, add_zero_attn=True), (N, E)),
    Case("llama", Llama, (N, E)),
    Case("llama, complex rotation, grouped heads", lambda: Llama(_rotate_complex, True), (N, E)),
    Case("gpt, likelihood, tied head", GPT, (N, E)),
    Case("vision transformer", ViT, (1, 4, 4)),
    Case("attention, boolean mask", lambda: _sdpa, (N, E)),
    Case("attention, alibi", lambda: _alibi, (N, E)),
    Case("attention, linear", lambda: _linear_attention, (N, E)),
]  # fmt: skip

"""The same models in JAX, for one sample: ``f(p, x)``, ``p`` the PyTorch model's tensors by name.

A twin is made from the PyTorch model and returns a scalar ``[]`` or a vector ``[m]``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from torch import nn

from benchmarks import models

__all__ = ["twin_of"]

Array = Any  # jax.Array; the JAX rival is optional and untyped here
Params = Mapping[str, Array]
Twin = Callable[[Params, Array], Array]


def twin_of(model: nn.Module) -> Twin:
    """The twin of a model, ``[]`` or ``[m]`` for a sample ``[*event]``."""
    body = TWINS[type(model)](model)

    def f(p: Params, x: Array) -> Array:
        y = body(p, x)
        return y.reshape(()) if y.size == 1 else y

    return f


def dense(p: Params, name: str, x: Array) -> Array:
    """``nn.Linear`` on the last axis."""
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def layer_norm(p: Params, name: str, x: Array) -> Array:
    """``nn.LayerNorm`` over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return centred * scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def chain(net: nn.Module, prefix: str = "") -> Twin:
    """The twin of an ``nn.Sequential`` of the layers used here."""
    layers = [(f"{prefix}{name}", layer) for name, layer in net.named_children()]

    def f(p: Params, x: Array) -> Array:
        for name, layer in layers:
            match layer:
                case nn.Linear():
                    x = dense(p, name, x)
                case nn.Tanh():
                    x = jnp.tanh(x)
                case nn.Flatten():
                    x = x.reshape(*x.shape[: layer.start_dim], -1)
                case nn.Conv2d():
                    y = jax.lax.conv_general_dilated(
                        x[None], p[f"{name}.weight"], layer.stride, "VALID"
                    )
                    x = y[0] + p[f"{name}.bias"][:, None, None]
                case _:
                    raise TypeError(f"no JAX twin for {type(layer).__name__}")
        return x

    return f


def quadratic(_: nn.Module) -> Twin:
    """The twin of ``models.Quadratic``."""
    return lambda p, x: 0.5 * x @ p["Q"] @ x


def glm(_: nn.Module) -> Twin:
    """The twin of ``models.Glm``."""
    return lambda p, x: jax.nn.softplus(dense(p, "linear", x)).sum()


def deep_set(model: nn.Module) -> Twin:
    """The twin of ``models.DeepSet``."""
    phi = chain(model.get_submodule("phi"), "phi.")
    rho = chain(model.get_submodule("rho"), "rho.")
    return lambda p, x: rho(p, phi(p, x).sum(-2))


def pairwise_energy(model: nn.Module) -> Twin:
    """The twin of ``models.PairwiseEnergy``."""
    net = chain(model.get_submodule("net"), "net.")

    def f(p: Params, x: Array) -> Array:
        difference = x[p["first"]] - x[p["second"]]
        # Not sqrt(sum(square)): jaxlib 0.10.2 compiles the Hessian of that wrongly on the CPU, from
        # sample 24 of a batch of 32 or more.
        distance = jnp.linalg.norm(difference, axis=-1, keepdims=True)
        return net(p, distance).sum()

    return f


def attention_block(model: nn.Module) -> Twin:
    """The twin of ``models.AttentionBlock``."""
    mlp = chain(model.get_submodule("mlp"), "mlp.")

    def f(p: Params, x: Array) -> Array:
        q, k, v = jnp.split(dense(p, "qkv", layer_norm(p, "norm1", x)), 3, axis=-1)
        weights = jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5, axis=-1)
        x = x + dense(p, "proj", weights @ v)
        x = x + mlp(p, layer_norm(p, "norm2", x))
        return dense(p, "head", x.mean(-2))

    return f


def encoder_layer(model: nn.Module) -> Twin:
    """The twin of ``models.EncoderLayer``."""
    heads = model.get_submodule("layer.self_attn").num_heads

    def split(t: Array) -> Array:
        return t.reshape(t.shape[0], heads, -1).swapaxes(0, 1)  # [heads, n, k / heads]

    def f(p: Params, x: Array) -> Array:
        mixed = x @ p["layer.self_attn.in_proj_weight"].T + p["layer.self_attn.in_proj_bias"]
        q, k, v = (split(t) for t in jnp.split(mixed, 3, axis=-1))
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5, axis=-1)
        attended = (weights @ v).swapaxes(0, 1).reshape(x.shape)
        x = layer_norm(p, "layer.norm1", x + dense(p, "layer.self_attn.out_proj", attended))
        hidden = jax.nn.gelu(dense(p, "layer.linear1", x), approximate=False)
        x = layer_norm(p, "layer.norm2", x + dense(p, "layer.linear2", hidden))
        return dense(p, "head", x.mean(-2))

    return f


TWINS: dict[type[nn.Module], Callable[[nn.Module], Twin]] = {
    nn.Sequential: chain,
    models.Quadratic: quadratic,
    models.Glm: glm,
    models.DeepSet: deep_set,
    models.PairwiseEnergy: pairwise_energy,
    models.AttentionBlock: attention_block,
    models.EncoderLayer: encoder_layer,
}

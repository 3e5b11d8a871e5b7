"""Hugging Face models from configurations, with random weights; none without `transformers`
(extra `models`), which is imported when a model is built."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo import Apply, Case

N, E = 3, 4
SIZES = {"hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6}
TOKENS = {"vocab_size": 11, "max_position_embeddings": 8}


def _embedded(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(inputs_embeds=x).last_hidden_state.exp().sum((1, 2)).sin()


def _next_token(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(inputs_embeds=x, use_cache=False).logits[:, -1].log_softmax(-1)[:, :2]


def _masked(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mask = torch.tensor([1, 1, 0]).expand(x.shape[0], N)
    return model(inputs_embeds=x, attention_mask=mask).last_hidden_state[:, 0].tanh().sum(1)


def _pixels(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=x).logits


def _bert(attention: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(**SIZES, **TOKENS, attn_implementation=attention)
    return transformers.BertModel(config).eval()


def _gpt2(attention: str) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        n_embd=E, n_layer=2, n_head=2, vocab_size=11, n_positions=8, attn_implementation=attention
    )
    return transformers.GPT2LMHeadModel(config).eval()


def _llama(attention: str) -> nn.Module:
    """With norms in x's precision: Llama's own convert to float32, whose rounding would hide
    errors."""
    import transformers

    config = transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 8, "num_attention_heads": 4}, **TOKENS,
        num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    layers = [*model.model.layers, model.model]
    for layer in layers:
        for name, norm in list(layer.named_children()):
            if type(norm).__name__ == "LlamaRMSNorm":
                setattr(layer, name, nn.RMSNorm(8, norm.variance_epsilon))
    return model


def _vit(attention: str) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        **SIZES, image_size=4, patch_size=2, num_channels=1, num_labels=3,
        attn_implementation=attention,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def _case(
    name: str, build: Callable[[str], nn.Module], call: Any, attention: str, *event: int
) -> Case:
    return Case(f"{name}, {attention}", lambda: Apply(build(attention), call), event)


CASES = (
    []
    if importlib.util.find_spec("transformers") is None
    else [
        _case("BERT", _bert, _embedded, "sdpa", N, E),
        _case("BERT, padded", _bert, _masked, "eager", N, E),
        _case("GPT-2", _gpt2, _next_token, "sdpa", N, E),
        _case("GPT-2", _gpt2, _next_token, "eager", N, E),
        _case("Llama", _llama, _next_token, "sdpa", N, 8),
        _case("ViT", _vit, _pixels, "sdpa", 1, 4, 4),
    ]
)

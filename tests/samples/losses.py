"""Uses of losses: every reduction, weights, targets that are constant or depend on x."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxhess.testing import Sample

T = torch.tensor([0.2, 0.9, 0.4, 0.6], dtype=torch.float64)
SIGN = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.3], dtype=torch.float64)
CLASS = torch.tensor([2])
CLASSES = torch.tensor([[0, 2, 1], [3, 0, 2]])


def _target(x: torch.Tensor) -> torch.Tensor:
    return T.expand(x.shape)


def _halves(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-6, 7, shape, generator=generator).double() / 2


POINTWISE = {
    "mse": lambda x: F.mse_loss(x.sin(), _target(x), reduction="none"),
    "l1": lambda x: F.l1_loss(x.sin(), _target(x), reduction="none"),
    "huber": lambda x: F.huber_loss(x, _target(x), reduction="none"),
    "huber 0.4": lambda x: F.huber_loss(x, x.sin(), delta=0.4, reduction="none"),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, _target(x), reduction="none"),
    "smooth_l1 0.4": lambda x: F.smooth_l1_loss(x, x.sin(), beta=0.4, reduction="none"),
    "smooth_l1 0": lambda x: F.smooth_l1_loss(x.sin(), _target(x), beta=0, reduction="none"),
    "bce": lambda x: F.binary_cross_entropy(torch.sigmoid(x), _target(x), reduction="none"),
    "bce weight": lambda x: F.binary_cross_entropy(
        torch.sigmoid(x), torch.sigmoid(x.sin()), WEIGHT, reduction="none"
    ),
    "bce logits": lambda x: F.binary_cross_entropy_with_logits(x, _target(x), reduction="none"),
    "bce logits weights": lambda x: F.binary_cross_entropy_with_logits(
        x, torch.sigmoid(x.sin()), WEIGHT, pos_weight=T + 1, reduction="none"
    ),
    "soft_margin": lambda x: F.soft_margin_loss(x, SIGN.expand(x.shape), reduction="none"),
    "kl_div": lambda x: F.kl_div(F.logsigmoid(x), _target(x), reduction="none"),
    "kl_div log": lambda x: F.kl_div(
        F.logsigmoid(x), F.logsigmoid(-x), reduction="none", log_target=True
    ),
    "poisson": lambda x: F.poisson_nll_loss(x, 2 * _target(x), full=True, reduction="none"),
    "poisson not log": lambda x: F.poisson_nll_loss(
        x * x + 1, _target(x), log_input=False, reduction="none"
    ),
    "hinge": lambda x: F.hinge_embedding_loss(x.sin(), SIGN.expand(x.shape), reduction="none"),
    "margin_ranking": lambda x: F.margin_ranking_loss(
        x.sin(), x * x, SIGN.expand(x.shape), 0.1, reduction="none"
    ),
}


def _class(x: torch.Tensor) -> torch.Tensor:
    return CLASS.expand(x.shape[0])


def _classes(x: torch.Tensor) -> torch.Tensor:
    return CLASSES.expand(x.shape[0], 2, 3)


CHOOSING = {
    "nll": lambda x: F.nll_loss(x.sin(), _class(x), reduction="none"),
    "nll weight": lambda x: F.nll_loss(x.sin(), _class(x), WEIGHT, reduction="none"),
    "nll ignored": lambda x: F.nll_loss(x, _class(x), ignore_index=2, reduction="none") + x[:, 0],
    "nll of its maximum": lambda x: F.nll_loss(x.sin(), x.argmax(1), reduction="none"),
    "cross_entropy": lambda x: F.cross_entropy(x, _class(x), reduction="none"),
    "cross_entropy weight": lambda x: F.cross_entropy(x, _class(x), WEIGHT, reduction="none"),
    "cross_entropy smoothing": lambda x: F.cross_entropy(
        x, _class(x), label_smoothing=0.1, reduction="none"
    ),
    "cross_entropy probabilities": lambda x: F.cross_entropy(
        x, torch.softmax(x.sin(), 1), reduction="none"
    ),
}
IMAGES = {
    "nll2d": lambda x: F.nll_loss(x.sin(), _classes(x), reduction="none"),
    "nll2d weight": lambda x: F.nll_loss(x.sin(), _classes(x), WEIGHT, reduction="none"),
    "cross_entropy2d": lambda x: F.cross_entropy(x, _classes(x), reduction="none"),
}


def _chunked(x):
    """The chunked loss, where this PyTorch has one; it cannot be differentiated twice itself."""
    if not hasattr(F, "linear_cross_entropy"):
        return _whole(x)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    target = torch.zeros(x.shape[0], dtype=torch.long)
    return F.linear_cross_entropy(x, ROWS, target, reduction="sum", options=options)


def _whole(x):
    return F.cross_entropy(x @ ROWS.T, torch.zeros(x.shape[0], dtype=torch.long), reduction="sum")


ROWS = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)

SAMPLES = [
    Sample("linear_cross_entropy, chunked", _chunked, (5, 4), batch=None, reference=_whole),
    *(Sample(name, f) for name, f in POINTWISE.items()),
    *(
        Sample(f"{name} at kinks", f, make=_halves, twice=False)
        for name, f in (
            ("huber", lambda x: F.huber_loss(x, 0 * x, reduction="none")),
            ("smooth_l1", lambda x: F.smooth_l1_loss(x, 0 * x, reduction="none")),
        )
    ),
    *(Sample(name, f) for name, f in CHOOSING.items()),
    *(Sample(name, f, (4, 2, 3), batch=2) for name, f in IMAGES.items()),
]

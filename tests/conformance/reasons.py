"""Why an entry is an exception, by its name and the kind of case (``"*"``: any kind)."""

from __future__ import annotations

from fnmatch import fnmatchcase

# (name, kind, reason); the first that fits counts.
REASONS: tuple[tuple[str, str, str], ...] = (
    (
        "nn.functional.linear_cross_entropy.chunked_none",
        "*",
        "no double backward: PyTorch documents that the chunked loss has none (fxhess takes the"
        " plain one)",
    ),
    ("sparse.sampled_addmm", "*", "no double backward: PyTorch fails at CSR gradients"),
    ("nn.functional.ctc_loss", "*", "no double backward: `_ctc_loss_backward` has no derivative"),
    ("nn.CTCLoss", "*", "no double backward: `_ctc_loss_backward` has no derivative"),
    ("nn.MultiMarginLoss", "*", "no double backward: its backward has no derivative in PyTorch"),
    (
        "nn.MultiLabelMarginLoss",
        "*",
        "no double backward: its backward has no derivative in PyTorch",
    ),
)


def reason(name: str, kind: str) -> str:
    """The reason, or an empty text."""
    for pattern, kinds, text in REASONS:
        if fnmatchcase(name, pattern) and kinds in ("*", kind):
            return text
    return ""

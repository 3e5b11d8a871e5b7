"""Why an entry is an exception, by its name and the kind of case (``"*"``: any kind)."""

from __future__ import annotations

from fnmatch import fnmatchcase

# (name, kind, reason); the first that fits counts.
REASONS: tuple[tuple[str, str, str], ...] = (
    (
        "nn.functional.linear_cross_entropy.chunked*",
        "*",
        "PyTorch documents that the chunked loss cannot be differentiated twice",
    ),
)


def reason(name: str, kind: str) -> str:
    """The reason, or an empty text."""
    for pattern, kinds, text in REASONS:
        if fnmatchcase(name, pattern) and kinds in ("*", kind):
            return text
    return ""

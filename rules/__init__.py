"""Rules are data: one line an operator, a file a family.  Importing this package registers all."""

from __future__ import annotations

from fxhess.rules import elementwise, products, reductions, shape

__all__ = ["elementwise", "products", "reductions", "shape"]

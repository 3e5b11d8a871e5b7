"""Conformance with PyTorch's own tables of operators and modules: ``python -m tests.conformance``.

In reading order: ``_pytorch`` (the tables, as uses: a call and one of its operands), ``cases`` (a
use as a function with one result a sample), ``judge`` (a case compared with double backward),
``records`` (what was found, kept as JSON lines), ``report`` (the page), ``__main__`` (the command).
"""

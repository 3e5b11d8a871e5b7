"""fxhess beside its rivals, on workloads as data: ``python -m benchmarks``.

``workloads``, ``growth`` and ``rivals`` are tables, one line to add to. ``measure`` runs and checks
one workload, ``worker`` does so in a process of its own, ``cold`` times first calls in fresh
processes. ``record`` holds what was measured and how it compares, ``report`` and ``plot`` show it.
Of fxhess, only the public API is used.
"""

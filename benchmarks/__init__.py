"""fxhess beside its rivals, on workloads as data: ``python -m benchmarks``.

``workloads`` and ``rivals`` are tables, one line to add to. ``measure`` runs and checks one
workload, ``worker`` does so in a process of its own, ``cold`` times first calls in fresh processes,
``report`` and ``plot`` show the results. Of fxhess, only the public API is used.
"""

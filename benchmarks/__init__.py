"""Speed and memory of fusedpo and its peers.

Run ``python -m benchmarks.speed`` and ``python -m benchmarks.memory``.
"""

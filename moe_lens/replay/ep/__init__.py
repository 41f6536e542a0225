"""Replay under expert parallelism, simulated or real: docs/expert-parallel.md."""

"""Recorded routing, run again through a real MoE layer and timed: docs/replay.md."""

"""An MoE layer as ops, in hand-written kernels on a GPU and quick on a CPU: docs/runtime.md.

Inference only: nothing here is differentiable, and nothing records a graph for autograd.
"""

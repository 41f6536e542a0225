"""The routing work of an MoE layer in CUDA C++, compiled at first use: docs/runtime.md.

`csrc/` holds the kernels as text. `compiler` turns them into a cubin and keeps it on disk,
`launch` runs one on torch's current stream, `kernels` are the ops.
"""

"""A small real MoE language model and the real text it learns from."""

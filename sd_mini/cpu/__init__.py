"""Faster on a CPU: `accelerate(network)` lets C kernels compute a network's passes. The only door to this room."""

from sd_mini.cpu.fused import accelerate, flow_map, stock_copy

__all__ = ["accelerate", "flow_map", "stock_copy"]

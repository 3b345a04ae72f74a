"""Tensors on their way between ranks: packed triangles, slices of parameters, buffers of owners."""

"""Arithmetic on tensors, without modules; start reading at :mod:`sdconv.ops.convolution`."""

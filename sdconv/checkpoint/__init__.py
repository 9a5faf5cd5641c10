"""Checkpoints: from a path to named tensors, to canonical names, to a configuration, and back."""

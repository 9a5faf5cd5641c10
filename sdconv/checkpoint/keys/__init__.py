"""Tensors' names in each layout, and the key maps between them."""

"""Names of tensors in each layout, and the maps between them."""

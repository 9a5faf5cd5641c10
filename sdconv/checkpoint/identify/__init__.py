"""From tensors' shapes to a network's config."""

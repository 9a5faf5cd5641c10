"""LoRA files: reading them, merging them into a network's weights, and unmerging them."""

"""LoRA files merged into a network's weights, and taken out again."""

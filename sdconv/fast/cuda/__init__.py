"""The fast backend on CUDA."""

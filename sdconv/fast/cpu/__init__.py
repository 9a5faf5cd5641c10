"""The fast backend on a CPU."""

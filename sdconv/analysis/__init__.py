"""What is known about a network: its structure, its contents, its equality with diffusers."""

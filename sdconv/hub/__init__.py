"""Weights by name: those that ship with sdconv, known checkpoints, and files on the hub.

``sdconv.fetch`` alone downloads. Everything else finds what is already on this machine.
"""

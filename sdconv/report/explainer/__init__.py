"""The explainer: one page that computes Stable Diffusion's convolutions on real weights."""

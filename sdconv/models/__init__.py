"""The networks, in plain torch: blocks, the VAE, the tiny autoencoder, the U-Net."""

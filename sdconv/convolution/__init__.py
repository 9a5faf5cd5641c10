"""The discrete convolution: reference implementations, and the arithmetic of its sizes."""

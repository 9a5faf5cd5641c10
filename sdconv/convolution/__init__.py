"""The discrete convolution itself: what it computes, and the arithmetic of its sizes."""

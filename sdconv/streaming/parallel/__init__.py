"""One image over several ranks: each computes a band of rows of every feature map."""

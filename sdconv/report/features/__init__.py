"""The page that shows feature maps: the drawing of the network, sprite sheets, statistics."""

"""Feature maps as a page and as figures: pictures, sprite sheets, the drawing of the network."""

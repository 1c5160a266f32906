"""Device code and its thinnest launchers. Never imports fastidc; importing it starts nothing."""

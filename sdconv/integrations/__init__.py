"""Where sdconv meets other packages."""

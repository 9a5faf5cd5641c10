"""What sdconv shows: tables and pictures."""

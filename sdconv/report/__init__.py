"""What sdconv shows: tables, plots and pages."""

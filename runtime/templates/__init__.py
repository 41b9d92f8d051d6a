"""Templates of the report (data only)."""

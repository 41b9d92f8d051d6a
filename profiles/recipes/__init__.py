"""Packaged recipes (data only)."""

"""Teachers in, student checkpoint out."""

"""What users write: recipes and device profiles. Kept empty so that listing them needs no YAML library."""

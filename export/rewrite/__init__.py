"""Rewrites of an exported graph into the operators that onnxruntime has fast kernels for: one rule, one file."""

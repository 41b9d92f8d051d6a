"""The graph that TensorRT engines are built from."""

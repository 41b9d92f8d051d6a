"""TensorRT engines: what a card can do, how an engine is built, named, kept and trusted."""

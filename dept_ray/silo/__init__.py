"""*Silo*: one source's whole training, in pure PyTorch, without Ray."""

"""*Study*: what a run will cost, and what its body is worth."""

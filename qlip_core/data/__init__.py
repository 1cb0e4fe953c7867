"""Picture-and-caption sets, and what reads and writes them."""

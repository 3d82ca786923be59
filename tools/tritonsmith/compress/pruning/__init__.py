"""Whole channels, heads and neurons removed from a graph or a module, and single weights set to zero."""

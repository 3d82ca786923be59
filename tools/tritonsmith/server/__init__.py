"""The embedded Triton: its environment, its process, and the Python-based backends that it serves with."""

"""The search over chains of steps for the model that keeps a drop, a size and a speed."""

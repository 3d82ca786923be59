"""INT4 and INT8 weights in blocks, and embedding tables with fewer rows; activations stay as they are."""

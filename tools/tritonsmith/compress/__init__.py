"""Steps from a model to a smaller one: an artifact in, a new artifact with one more step out.

Each writes to a staging folder, opens what it wrote in the target engine, and then renames.
"""

"""A student that learns to answer as its teacher does: the artifact itself, one given, or one derived."""

"""What docker/ and a cluster need, rendered from a repository and from what was measured of it."""

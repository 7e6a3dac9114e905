"""Measurements of the embedded model: run from a checkout of the repository, not part of the package."""

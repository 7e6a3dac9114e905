"""Feature extractors, distances and scores of sets of pictures."""

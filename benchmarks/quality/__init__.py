"""How good pictures are: distances, scores and sheets."""

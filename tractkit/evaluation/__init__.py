"""How good a tractogram is: scores, and what a model has to beat."""

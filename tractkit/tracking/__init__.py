"""From a model to new streamlines."""

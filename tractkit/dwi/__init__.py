"""From a diffusion series to the input of a model; made-up subjects with known bundles."""

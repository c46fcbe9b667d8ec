"""From a diffusion series to the input of a model; made-up subjects with known bundles."""

from tractkit._moved import answer_old_names

answer_old_names(__name__)  # those of the module that had the package's name

"""The data file: created, validated, described, read here or from a URL."""

from tractkit._moved import answer_old_names

answer_old_names(__name__)  # those of the module that had the package's name

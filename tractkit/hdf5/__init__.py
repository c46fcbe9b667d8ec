"""The data file: created, validated, described, read here or from a URL."""

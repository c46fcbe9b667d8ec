"""Errors with place and fix, files that are whole or absent, keyed random numbers, HTML of objects."""

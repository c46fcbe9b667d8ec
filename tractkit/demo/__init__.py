"""The whole way in one command."""

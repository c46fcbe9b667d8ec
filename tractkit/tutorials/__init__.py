"""The tutorials (nbs/9*.ipynb) as package data, copied by tools/export.py."""

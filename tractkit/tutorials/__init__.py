"""The tutorials (nbs/tutorials/*.ipynb) as package data, copied by tools/export.py."""

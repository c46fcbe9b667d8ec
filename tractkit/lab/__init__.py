"""The trainer's widgets in JupyterLab."""

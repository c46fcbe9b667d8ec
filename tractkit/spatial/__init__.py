"""Voxels, points and streamlines in space."""

"""The trainer: settings, state, loop, control."""

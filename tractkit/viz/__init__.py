"""Pictures of volumes, streamlines and losses, by FURY, matplotlib or NiiVue."""

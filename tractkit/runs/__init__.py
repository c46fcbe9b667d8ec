"""A run's folder: its log, checkpoints, lock, mailbox, and what reads them."""

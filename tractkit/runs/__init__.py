"""A run's folder: its log, checkpoints, lock, mailbox, and what reads them."""

from tractkit._moved import answer_old_names

answer_old_names(__name__)  # those of the module that had the package's name

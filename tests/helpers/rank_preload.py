"""Imported once by the fork server of `tests.helpers.ranks`, so that ranks start warm."""

from trainer.worker import preload

preload("cpu")

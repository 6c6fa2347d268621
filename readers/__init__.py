"""Readers of datasets. `datasets.py` is their interface."""

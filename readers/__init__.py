"""Readers of datasets. `datasets.py` is their interface.

* Images: `images` (decoding), `metadata` (files whose metadata Pillow refuses).
* Datasets: `folders`, `streams` (timm's readers), `shards` (WebDataset), `downloads`, `synthetic`.
* `class_names`: comparison of names, and names to show.
"""

"""Experiments whose results are in docs/experiments: corpora and models out of packages, and one script a page."""

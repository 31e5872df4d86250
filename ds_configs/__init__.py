"""Packaged DeepSpeed configurations."""

"""The one on-disk format: topology-free, atomic, checksummed."""

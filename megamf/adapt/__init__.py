"""Small sets of parameters trained beside frozen weights."""

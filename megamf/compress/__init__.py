"""Smaller and sparser models out of trained ones."""

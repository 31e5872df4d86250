"""Modelling files that go into saved folders; they need torch and transformers only."""

"""A trained model as a set of modules: what each of them does, and checkpoints with other modules in them."""

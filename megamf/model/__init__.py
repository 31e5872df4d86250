"""The ModuleFormer, for training and inference, without any process group."""

"""Files that are copied into a converted model's folder; they import torch only."""

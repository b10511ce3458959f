"""The distillation algorithms. They see denoisers and tensors, never adapters, files or a model's name."""

"""Training the memory: distillation, fine-tuning in stages, data."""

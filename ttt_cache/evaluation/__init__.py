"""What the memory is worth beside its controls, and what it costs."""

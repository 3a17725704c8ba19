"""Data sets: from files to arrays and tensors."""

"""The Python interface to the model: any image in, a labeled image out."""

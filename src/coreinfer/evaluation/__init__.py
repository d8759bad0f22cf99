"""Measuring quality with the code that decodes."""

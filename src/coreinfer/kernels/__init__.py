"""Products with quantised weights on a CPU: native code, and the torch twins that define it."""

"""The native backend: a compact decoder for CPUs, with weights in bfloat16, int8 or int4."""

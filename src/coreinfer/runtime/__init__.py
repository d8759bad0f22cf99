"""One path from prompts to text: prefill, select, decode."""

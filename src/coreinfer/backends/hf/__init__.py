"""The hf backend: core-neuron decoding on a Hugging Face model, in place."""

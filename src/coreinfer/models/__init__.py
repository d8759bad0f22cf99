"""What an architecture's MLP is, and loading."""

"""What pays only on a CPU."""

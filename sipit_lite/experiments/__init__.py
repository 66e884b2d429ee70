"""What is measured: benches, the paper's experiments, defences, other methods for comparison."""

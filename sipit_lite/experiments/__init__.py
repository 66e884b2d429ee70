"""What is measured: benches, experiments of the paper, defences, other methods."""

"""What goes beyond the paper: drafts by a lens, the last state, many processes."""

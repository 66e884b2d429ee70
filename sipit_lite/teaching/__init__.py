"""What chapters share: the mathematics of Part I, finite models, figures."""

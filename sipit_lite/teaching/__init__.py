"""What two or more chapters share: the mathematics of Part I in sympy, finite models, the style of figures."""

"""The bundled model, its tokenizer and held-out text; ``train_pocket.py`` made it."""

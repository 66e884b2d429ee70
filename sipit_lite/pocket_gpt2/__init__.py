"""The bundled model, its tokenizer and its held-out passages; ``train`` made it."""

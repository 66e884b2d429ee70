"""Names become models, states come in and go out: loading, capture, text, corpora, shards."""

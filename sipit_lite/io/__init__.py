"""Names become models, states come in and go out; text, corpora and shards."""

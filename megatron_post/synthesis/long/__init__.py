"""What the recipes for long contexts share: chunks, spans and buckets, in tokens of the real tokenizer."""

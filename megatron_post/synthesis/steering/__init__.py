"""What steerability checks without a model: rules on the length, format and language of a reply."""

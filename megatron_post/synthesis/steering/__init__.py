"""Checks that need no model: rules on the length, the format and the language of a reply."""

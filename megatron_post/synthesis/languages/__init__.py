"""What the recipes for languages share: languages and scripts of texts, and what a translation keeps."""

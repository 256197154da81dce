"""Text: tokenizers, detokenisation, and the outputs that callers get."""

"""The demo model that ships in the wheel: the text it learns from, its tokenizer, its training."""

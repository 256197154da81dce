"""Grammar backends for structured output."""

"""Compare, localize, explain: verdicts over trees, and the Hugging Face path."""

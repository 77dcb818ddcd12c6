"""The language_model method: next-token prediction with all parameters."""

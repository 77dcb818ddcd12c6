"""Texts written by a language model: passages of graded relevance for queries."""

"""Scoring a retriever on collections, comparing systems, and the tables and plots of a report."""

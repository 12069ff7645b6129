"""Duplicates of rows: exact, near and semantic ones, and rows that repeat evaluation data."""

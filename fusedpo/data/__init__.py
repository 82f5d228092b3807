"""Rows of text and of token ids: reading, tokenizing, padding, sampling."""

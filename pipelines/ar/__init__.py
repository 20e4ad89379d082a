"""Autoregressive image models on visual tokens: orders, generators, and their pipeline."""

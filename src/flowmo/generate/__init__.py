"""Stage 2: a MaskGIT that generates a tokenizer's ids from classes."""

"""Stage 2: a MaskGiT that generates a tokenizer's ids from classes."""

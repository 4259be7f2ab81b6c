"""Entropy coding: what the bits of ids are likely to be, and a range coder that makes short strings of that."""

"""Stage 2: pictures from tokens. A dataset as ids, a MaskGiT that learns them, and its samples."""

"""Section 3 of the paper as tensors: networks, flow, sampler, quantizers. No files, data or training."""

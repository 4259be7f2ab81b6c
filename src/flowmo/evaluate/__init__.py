"""How good reconstructions are: figures of pairs of pictures, and their mean over a set."""

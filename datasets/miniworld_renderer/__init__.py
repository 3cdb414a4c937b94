"""The mini-world: photos made of emoji artwork, in the formats of real data (see datasets/README.md)."""

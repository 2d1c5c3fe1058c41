"""Algorithms, one file each, on top of shared functions; and the tools around them."""

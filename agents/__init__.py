"""Single-file algorithms over a kernel of shared functions, and the tools around them."""

"""Secrets that a command line may hold, taken out before it is written down."""

HIDDEN = "[hidden]"

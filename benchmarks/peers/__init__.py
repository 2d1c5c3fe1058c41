"""Other libraries as contenders; each runs in its own process (`benchmarks.worker`)."""

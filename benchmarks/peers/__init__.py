"""Other libraries as contenders, each a process of its own (`benchmarks.worker`)."""

"""Evidence that output is lossless: greedy identity and chi-square tests of sampled text."""

"""Exports for llama.cpp: GGUF files of the target and of drafters, n-gram cache files, and the commands to run them."""

"""What training compiles with torch.compile."""

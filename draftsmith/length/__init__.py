"""Draft length: policies, the wrapper that applies them to a drafter, and the cost of forwards."""

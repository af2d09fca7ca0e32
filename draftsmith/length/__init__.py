"""How many tokens to draft: policies, the controller around a drafter, and what forwards cost."""

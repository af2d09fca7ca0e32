"""Training of drafters that draft several tokens in one pass: where drafts begin, what they see, their mask token."""

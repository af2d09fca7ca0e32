"""Parts that several families of drafters share."""

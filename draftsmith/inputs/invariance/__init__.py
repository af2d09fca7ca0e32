"""The self-test that finds the shapes in which a target computes the same bits however its tokens are fed."""

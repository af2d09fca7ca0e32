"""Many runs: sweeps over settings, and the drafters of one table."""

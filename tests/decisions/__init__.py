"""The decision log: what the leader decides in thousands of seeded random histories. See README.md."""

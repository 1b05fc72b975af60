"""``kvbm demo``: the same conversations with and without KVBM, measured and compared."""

"""``kvbm replay``: request traces through the real pool, with any policy, capacity and number of tiers."""

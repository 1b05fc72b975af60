"""Blocks from other instances' host memory, and ours for them.

`network` is the thread that talks: to the directory (who lives, who holds what) and to peers. `serving` promises our
blocks to others; `tier` and `offer` have theirs read for our requests; all three are under the leader's lock. `rank` is
the part beside each worker, which moves the bytes.
"""

"""Blocks from other instances' host memory, and ours for them.

`network` is the thread that talks: to the directory (who lives, who holds what) and to peers. `serving` promises our
blocks to others, `fetch` has theirs read for our requests; both are under the leader's lock. `memory` is the part
beside each worker, which moves the bytes.
"""

"""How ranks reach each other: groups of processes or threads, shared memory, the store where they meet."""

"""Transport, mesh, and one file per dimension of parallelism."""

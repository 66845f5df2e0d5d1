"""Tasks that any number of workers share through a folder: claimed by leases, published by rename, each done once.

    leases.py   who works at a task, as files that age
    tasks.py    tasks, stages, and what is published of them
    shift.py    the loop of a worker: the next task that nobody has, until all are done
    pool.py     workers of this machine, and the bar

No process leads: a worker on another machine that sees the folder may join, leave or die at any time.
"""

"""Chores that any number of workers share through a folder: claimed by leases, published by rename, each done once.

    leases.py   who works at a chore, as files that age
    chores.py   chores, phases, and what is published of them
    shift.py    the loop of a worker: the next chore that nobody has, until all are done
    pool.py     workers of this machine, and the bar

No process leads: a worker on another machine that sees the folder may join, leave or die at any time.
"""

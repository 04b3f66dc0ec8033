"""A federation on one machine: every client of every round, in this process or in workers."""

"""Self-test: golden cases that a backend's machine code runs at its first use on a device, before other work.

`cases` defines them, `arena` lays them out in memory, `run` compares, `remembered` keeps what passed for
other processes, `gate` decides when.
The reference takes no test: it is what the others are compared with.
"""

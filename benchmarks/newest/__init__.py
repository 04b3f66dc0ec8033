"""Whether the adapters hold with the newest releases that the index has, not those of constraints.txt."""

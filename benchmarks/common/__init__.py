"""What every question shares: the machine, timing, memory, pages."""

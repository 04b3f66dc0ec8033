"""What a whole simulation takes of the memory of a machine, beside what is planned for it."""

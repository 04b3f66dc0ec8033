"""A federation over other people's transports: a module each, which imports its framework lazily."""

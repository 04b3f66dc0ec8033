"""What do the method and its baselines reach on the scenarios? The page of the results."""

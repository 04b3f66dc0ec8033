"""What FedKSeed is compared with: other methods on the same clients, rounds, rows and scores."""

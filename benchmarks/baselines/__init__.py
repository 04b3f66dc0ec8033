"""What we measure against: the official algorithm written anew, MeZO, the ways of torch."""

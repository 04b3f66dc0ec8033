"""The round between a server and its clients: messages as bytes, sums of replies, saved state."""

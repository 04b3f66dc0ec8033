"""How long does a whole local step take, in every storage mode?"""

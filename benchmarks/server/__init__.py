"""How long does a server take to merge a round?"""

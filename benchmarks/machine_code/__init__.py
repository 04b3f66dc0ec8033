"""How many instructions do the compiled GPU kernels take?"""

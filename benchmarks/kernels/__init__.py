"""How fast is a pass over the weights, beside the official algorithm?"""

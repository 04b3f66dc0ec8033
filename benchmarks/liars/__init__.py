"""How far do liars move a round's weights, with bounds and without, and what do honest clients lose?"""

"""What does rounding do to the weights in 200 steps?"""

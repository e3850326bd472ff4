"""Make training data from what is at hand: hard negatives, teachers, code pairs."""

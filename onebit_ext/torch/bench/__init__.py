"""The torch half of `onebit-ext bench`: what our calls are alternated with, and the whole-model comparison."""

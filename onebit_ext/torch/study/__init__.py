"""The torch half of `onebit-ext study`: arms, tasks, and the training of one of each. Not a library.

Arms, tasks, records and the report know no engine: an engine turns a float model into ternary layers with an optimizer.
"""

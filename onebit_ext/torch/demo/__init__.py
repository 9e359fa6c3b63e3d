"""The torch half of `onebit-ext demo`: its model, its training loop, its two stages. Not a library."""

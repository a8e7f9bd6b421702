"""Which units of a model are silent, when they died, for good or not, and how to revive them."""

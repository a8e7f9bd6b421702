"""Which units of a model are silent, when they died, whether for good, and their revival."""

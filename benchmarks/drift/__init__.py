"""How soon a drift is found and how often it is a false alarm."""

"""Published models that packages carry, on real data that packages carry."""

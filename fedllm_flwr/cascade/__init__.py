"""Small models answer what they may; the rest is deferred."""

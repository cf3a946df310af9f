"""How flat values become bytes on the wire and come back."""

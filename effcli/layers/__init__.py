"""What a pass is, which layers it takes, and what it is given of them."""

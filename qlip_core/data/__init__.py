"""Sets of captioned pictures: reading and writing them."""

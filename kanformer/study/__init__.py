"""How much of a pretrained model each kind of block keeps, over its parameters: the same grid, tokens and order for all of them."""

"""From statistics to a number for every edge and every function, and tables of them."""
